r"""What a trained network says of images.

  python -m mimicnorm_jax.tools.predict RUN photo.jpg folder/
  find . -name '*.png' | python -m mimicnorm_jax.tools.predict RUN -

RUN is the folder of a run, or of its export as safetensors. A folder stands for all images below
it, ``-`` for a list of paths on standard input. Damaged images are named and
left out; then the exit code is 1. The answers are kept by --csv, --json and --plot=FILE.png.
"""

from __future__ import annotations

import csv
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mimicnorm_jax import command_line
from mimicnorm_jax.data.listing import list_class
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.export.rebuilt import is_export
from mimicnorm_jax.parallel import make_mesh
from mimicnorm_jax.paths import define_path, expanded
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.report import JSON, PLOT, WHICH, check_output, write_json
from mimicnorm_jax.train.setup import configure_jax, silence_false_alarms
from mimicnorm_jax.train.workdir import saved_config
from mimicnorm_jax.trained import TrainedNetwork, load

for _name in ("json", "plot", "which"):  # shown by --help
    flags.declare_key_flag(_name)

_TOP = flags.DEFINE_integer("top", 5, "Classes shown of each image.", 1)
_CSV = define_path("csv", None, "Where the answers go as a table; unset for nowhere.")

_AT_A_TIME = 64  # images in memory
_MOST_SHOWN = 36  # in a picture

Answer = dict[str, Any]


def images_in(arguments: Sequence[str]) -> list[pathlib.Path]:
    """The image files that arguments of the command line stand for, in order.

    Raises:
      UserError: there is no such file, no image in a folder, or an empty list. (A file that a
        list names may be missing: it counts as damaged.)
    """
    found: list[pathlib.Path] = []
    for argument in arguments:
        if argument == "-":
            listed = [pathlib.Path(line) for line in sys.stdin.read().splitlines() if line]
            if not listed:
                raise UserError("the list on standard input is empty")
        else:
            listed = [expanded(argument)]
            if not argument or not listed[0].exists():
                raise UserError(f"{argument!r} does not exist")
        for path in listed:
            found += _images_below(path) if path.is_dir() else [path]
    return found


def _images_below(folder: pathlib.Path) -> list[pathlib.Path]:
    with refused_by_system(f"cannot read folder {folder}"):
        found = list_class(folder).files
    if not found:
        raise UserError(f"{folder} has no images")
    return [folder / name for name in found]


def answers(
    network: TrainedNetwork, paths: Sequence[pathlib.Path], *, top: int
) -> Iterator[tuple[Answer, np.ndarray]]:
    """What the network says of each image that can be read; names the others.

    Args:
      network: which.
      paths: of image files.
      top: how many classes of each.

    Yields:
      ``path`` and ``classes``, each a ``class`` and its ``probability``, the likeliest first;
      and the image as the network sees it.
    """

    def read(path: pathlib.Path) -> np.ndarray | UserError:
        try:
            return network.preprocess(path)
        except UserError as error:
            return error

    for start in range(0, len(paths), _AT_A_TIME):
        images, readable = [], []
        some = paths[start : start + _AT_A_TIME]
        with ThreadPoolExecutor() as pool:
            for path, image in zip(some, pool.map(read, some), strict=True):
                if isinstance(image, UserError):
                    tqdm.write(f"WARNING: {image}", file=sys.stderr)
                else:
                    images.append(image)
                    readable.append(path)
        if not images:
            continue
        found = network.predict(np.stack(images))
        for path, image, probabilities in zip(readable, images, found, strict=True):
            order = np.argsort(-probabilities, kind="stable")[:top]
            classes = [
                {"class": network.classes[i], "probability": float(probabilities[i])} for i in order
            ]
            yield {"path": str(path), "classes": classes}, image


def line(answer: Answer) -> str:
    """An answer for people."""
    classes = (f"{100 * c['probability']:5.1f} % {c['class']}" for c in answer["classes"])
    return f"{answer['path']}:  " + "  ".join(classes)


def write_csv(found: Sequence[Answer], path: pathlib.Path) -> None:
    """Writes a table: a row for each image, and two columns for each class shown."""
    count = max((len(answer["classes"]) for answer in found), default=0)
    names = [f"{name}_{i}" for i in range(1, count + 1) for name in ("class", "probability")]
    # the name of a file need not be text
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", *names])
        for answer in found:
            cells = [cell for c in answer["classes"] for cell in (c["class"], c["probability"])]
            writer.writerow([answer["path"], *cells])


def plot(found: Sequence[Answer], images: Sequence[np.ndarray], path: pathlib.Path) -> None:
    """Draws images, as the network sees them, with their answers below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    columns = min(6, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, answer, image in zip(grid, found, images, strict=False):
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
        best = answer["classes"][0]
        name = f"{best['class']}, {100 * best['probability']:.0f} %"
        axes.set_title(name, fontsize=9, y=-0.18)
    figure.savefig(path, dpi=120)


def _run(run: str = "", *arguments: str) -> None:
    if not run or not arguments:
        raise UserError("say which run and which images: RUN PATH…")
    check_output("json", JSON.value, [".json"])
    check_output("csv", _CSV.value, [".csv"])
    check_output("plot", PLOT.value, [".png"])
    folder = expanded(run)
    if not is_export(folder):
        configure_jax(saved_config(folder))
    paths = images_in(arguments)
    silence_false_alarms(make_mesh(1))
    network = load(run, WHICH.value)  # type: ignore[arg-type]
    top = min(_TOP.value, len(network.classes))
    found: list[Answer] = []
    shown: list[np.ndarray] = []
    with progress_bar(total=len(paths), unit="image") as progress:
        for answer, image in answers(network, paths, top=top):
            found.append(answer)
            if len(shown) < _MOST_SHOWN:
                shown.append(image)
            tqdm.write(line(answer))
            progress.update()
    write_json(json.dumps(found, indent=2) + "\n")
    if _CSV.value:
        with refused_by_system(f"--csv={_CSV.value} cannot be written"):
            write_csv(found, pathlib.Path(_CSV.value))
        print(f"table: {_CSV.value}")
    if PLOT.value and found:
        with refused_by_system(f"--plot={PLOT.value} cannot be written"):
            plot(found[:_MOST_SHOWN], shown, pathlib.Path(PLOT.value))
        print(f"picture: {PLOT.value}")
    if left_out := len(paths) - len(found):
        print(f"{left_out} of {len(paths)} images could not be read", file=sys.stderr)
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program(
        {"": _run}, without_config={""}, takes_arguments=True, argv=argv
    )


if __name__ == "__main__":
    main()
