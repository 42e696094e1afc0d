r"""The signal in a network, layer by layer, with the theory's prediction beside it.

  python -m mimicnorm_jax.tools.probe --config configs/digits_resnet20.py \
      --methods=nonorm,batchnorm,mimicnorm

At initialization, or in a trained state with ``--checkpoint=RUN``. Prints a table, and writes
a picture and a JSON file. ``--draws=N`` averages over N initializations: in narrow layers
one differs from the next by more than any theory could say.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence

from absl import flags

from mimicnorm_jax import command_line
from mimicnorm_jax.errors import UserError, refused_by_system, unknown
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.tools.probe.plot import plot
from mimicnorm_jax.tools.probe.rows import as_json, probe, table
from mimicnorm_jax.tools.report import (
    CHECKPOINT,
    COMPARED,
    IMAGES,
    JSON,
    PLOT,
    check_output,
    write_json,
)

for _name in ("checkpoint", "methods", "images", "json", "plot"):  # shown by --help
    flags.declare_key_flag(_name)

_DRAWS = flags.DEFINE_integer(
    "draws", 1, "Initializations to average over; the gradient is of the first.", 1
)


def _run() -> None:
    config = command_line.config()
    images = IMAGES.value or 32
    picture = "probe.png" if PLOT.value is None else PLOT.value
    if COMPARED.value == []:
        raise UserError("--methods= is empty; leave it out for config.method")
    methods = list(dict.fromkeys(COMPARED.value or [config.method]))
    for method in methods:
        if method not in METHODS:
            raise unknown("--methods", method, METHODS)
    checkpoint = None if CHECKPOINT.value is None else pathlib.Path(CHECKPOINT.value)
    if checkpoint is not None and (COMPARED.value or _DRAWS.value > 1):
        raise UserError("--checkpoint is one state of one method; leave out --methods and --draws")
    check_output("plot", picture, (".png", ".pdf", ".svg"))
    check_output("json", JSON.value, (".json",))
    rows = probe(config, methods, images=images, draws=_DRAWS.value, checkpoint=checkpoint)
    print(table(rows, columns=shutil.get_terminal_size((200, 0)).columns))
    write_json(as_json(rows))
    if picture:
        state = f"of {checkpoint}" if checkpoint else "at initialization"
        title = f"{config.network} {state}, {images} images"
        with refused_by_system(f"--plot={picture} cannot be written"):
            plot(rows, pathlib.Path(picture), title)
        print(f"picture: {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program(_run, argv=argv)


if __name__ == "__main__":
    main()
