"""What the programs that measure do with their results."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.paths import define_path

# Flags of several programs, which one process may import.
JSON = define_path("json", None, "FILE.json for the numbers, or the answers; unset for none.")
PLOT = define_path(
    "plot", None, "FILE.png for a picture (probe: probe.png if unset; empty for none)."
)
COMPARED = flags.DEFINE_list(
    "methods",
    None,
    "What to compare. probe: methods (default: config.method). memory and benchmark: methods, or "
    "plain (Flax's own layers with BatchNorm), each with fields to set after colons, such as "
    "mimicnorm:remat=block; by default batchnorm, mimicnorm, nonorm, and for memory fixup where it "
    "fits. benchmark: also torch:batchnorm and torch:nonorm; ratios are to the first.",
)
BATCH = flags.DEFINE_integer(
    "batch", None, "Examples in a step, over all devices; benchmark inference: in a call.", 1
)
NUM_CLASSES = flags.DEFINE_integer("num-classes", None, "Where the data set does not tell.", 2)
IMAGES = flags.DEFINE_integer("images", None, "Images (probe: 32, gradient_error: 256).", 2)
WHICH = flags.DEFINE_enum("which", "best", ("best", "latest"), "Which checkpoint.")
CHECKPOINT = define_path("checkpoint", None, "Look into the latest state of this run.")


def check_output(name: str, path: str | None, endings: Sequence[str]) -> None:
    """Finds out before the work whether its result can be written.

    Args:
      name: of the flag.
      path: its value; nothing is checked without one.
      endings: allowed ones of the file name.

    Raises:
      UserError: it cannot.
    """
    if path:
        if pathlib.Path(path).suffix not in endings:
            raise UserError(f"--{name}={path} does not end in {' or '.join(endings)}")
        folder = pathlib.Path(path).absolute().parent
        if not folder.is_dir():
            raise UserError(f"--{name}={path} cannot be written: {folder} is not a folder")
        if pathlib.Path(path).is_dir():
            raise UserError(f"--{name}={path} cannot be written: that is a folder")


def write_json(text: str) -> None:
    """Writes the numbers to where ``--json`` says, if it does."""
    if JSON.value:
        with refused_by_system(f"--json={JSON.value} cannot be written"):
            pathlib.Path(JSON.value).write_text(text)
        print(f"numbers: {JSON.value}")
