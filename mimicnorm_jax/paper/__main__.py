r"""Draws the paper's figures from real networks and real images.

python -m mimicnorm_jax.paper figure4 --out figures
python -m mimicnorm_jax.paper all --quick --out figures --data DIR_OF_MNIST
python -m mimicnorm_jax.paper figure10 --out figures --data DIR  # DIR/train/<class>/*.jpg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from mimicnorm_jax.arguments import Parser, run
from mimicnorm_jax.errors import unknown
from mimicnorm_jax.paths import expanded


def _parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m mimicnorm_jax.paper", str(__doc__))
    parser.add_argument(
        "figures",
        nargs="+",
        metavar="FIGURE",
        help=", ".join([*names, "all"]),
    )
    parser.add_argument("--out", type=expanded, required=True, help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="smaller networks, a few minutes")
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (default), or a folder with MNIST's files (.gz) or train/<class>/*.{jpg,png}",
    )
    options = parser.parse_args(arguments)
    for name in options.figures:
        if name not in (*names, "all"):
            raise unknown("figure", name, (*names, "all"))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program: exit code 0, or 2 where something is wrong with the command."""
    from mimicnorm_jax.paper.drawing import load, make_folder, write
    from mimicnorm_jax.paper.figures import FIGURES

    def program() -> None:
        options = _parse(arguments, list(FIGURES))
        data = load(options.data)
        make_folder(options.out)
        chosen = list(FIGURES) if "all" in options.figures else list(dict.fromkeys(options.figures))
        for name in chosen:
            figure = FIGURES[name]
            print(f"{name}: {figure.claim} …", flush=True)
            began = time.monotonic()
            write(name, figure, figure.compute(data, options.quick), options.out)
            print(f"  {options.out / name}.png, {time.monotonic() - began:.0f} s", flush=True)

    run(program)


if __name__ == "__main__":
    main()
