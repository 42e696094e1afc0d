"""Files that are whole and right, or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from mimicnorm_jax.errors import UserError, refused_by_system

SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo", "safetensors": ".safetensors"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: the file or folder.
      input_shape: of the images: a name, or a multiple of one, where an extent is free.
      difference: the largest between its outputs and the network's, as a multiple of the largest
        output where that is above 1.
      note: why fewer extents are free than were asked for; empty where none.
    """

    path: pathlib.Path
    input_shape: tuple[str | int, ...]
    difference: float
    note: str = ""

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.input_shape))
        said = f"{self.path}: images ({shape}), within {self.difference:.1e} of the network"
        return f"{said}; {self.note}" if self.note else said


def check_suffix(path: pathlib.Path, own: str) -> None:
    """Raises ``UserError`` where a file is named as one of another format.

    Args:
      path: of the file.
      own: the suffix of its format.
    """
    if path.suffix in set(SUFFIXES.values()) - {own}:
        raise UserError(f"{path} is not named as what it is to be: {path.with_suffix(own).name}")


@contextlib.contextmanager
def written(*paths: pathlib.Path) -> Iterator[tuple[pathlib.Path, ...]]:
    """Gives names beside ``paths``, whose files take their places if all goes well.

    Args:
      *paths: of files to write.

    Yields:
      The names to write to.

    Raises:
      UserError: the system refuses.
    """
    folder = paths[0].absolute().parent
    if not folder.is_dir():
        raise UserError(f"{paths[0]} cannot be written: {folder} is not a folder")
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} cannot be written: that is a folder")
    with refused_by_system(f"{paths[0]} cannot be written"):
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        try:
            names = tuple(temporary / path.name for path in paths)
            yield names
            for name, path in zip(names, paths, strict=True):
                os.replace(name, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
