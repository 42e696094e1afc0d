"""Images in class folders."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.sources import EncodedSource, View, digest
from mimicnorm_jax.errors import UserError, refused_by_system

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_SUFFIXES = ", ".join(IMAGE_SUFFIXES)


class FolderSource(EncodedSource):
    """A split stored as ``directory/<class>/*.{jpg,jpeg,png}``.

    Args:
      directory: the split's folder.
      view: what the images become.
      for_training: one class, or a class without images, is an error; False leaves out classes
        without images.

    Raises:
      UserError: a folder that does not exist or may not be read, or has no images; or, for
        training, has fewer than two class folders or one without images.
    """

    def __init__(self, directory: str | pathlib.Path, view: View, *, for_training: bool = True):
        self.directory = pathlib.Path(directory)
        self._for_training = for_training
        self.paths: list[pathlib.Path] = []
        class_names: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        with refused_by_system(f"cannot read folder {directory}"):
            for folder in self._class_folders():
                found = sorted(
                    path
                    for path in folder.iterdir()
                    if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
                )
                if not found:
                    if for_training:
                        raise UserError(f"class folder {folder} has no images ({_SUFFIXES})")
                    empty.append(folder.name)
                    continue
                labels += [len(class_names)] * len(found)
                class_names.append(folder.name)
                self.paths += found
        if not self.paths:
            raise UserError(f"the class folders of {directory} have no images ({_SUFFIXES})")
        if empty:
            print(f"NOTE: without images in {directory}: {', '.join(empty)}", file=sys.stderr)
        self.labels = np.array(labels, np.int32)
        super().__init__(class_names, view)

    def __len__(self) -> int:
        return len(self.paths)

    def _class_folders(self) -> list[pathlib.Path]:
        expected = f"expected {self.directory}/<class>/*.jpg"
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a folder; {expected}")
        folders = sorted(
            path
            for path in self.directory.iterdir()
            if path.is_dir() and not path.name.startswith(".")
        )
        if not folders:
            raise UserError(f"{self.directory} has no class folders; {expected}")
        if len(folders) == 1 and self._for_training:
            raise UserError(
                f"{self.directory} has a single class, {folders[0].name}: nothing to learn; "
                f"{expected}"
            )
        return folders

    @functools.cached_property
    def identity(self) -> str:
        # all names, and some sizes: asking for a million of them would take minutes
        names = (os.fsencode(path.relative_to(self.directory)) + b"\n" for path in self.paths)
        chosen = np.linspace(0, len(self) - 1, min(1000, len(self))).astype(int)
        with refused_by_system(f"cannot read the images in {self.directory}"):
            sizes = np.array([self.paths[index].stat().st_size for index in chosen])
        return digest([*names, sizes])

    def read(self, index: int) -> tuple[bytes, int]:
        return self.paths[index].read_bytes(), int(self.labels[index])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


def open_folders(data: ConfigDict, parts: Sequence[str]) -> list[FolderSource]:
    """The folders of ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them."""
    root = pathlib.Path(data.dir).expanduser()
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.is_dir():
            where = "" if root.is_absolute() else f" below {pathlib.Path.cwd()}"
            raise UserError(f"config.data.dir = {data.dir!r} is not a folder{where}")
    found = [
        FolderSource(root / data[f"{part}_split"], View.of(data), for_training="train" in parts)
        for part in parts
    ]
    first, last = found[0], found[-1]
    if first.class_names != last.class_names:
        differing = sorted(set(first.class_names) ^ set(last.class_names))
        raise UserError(
            f"the classes of {first.directory} and {last.directory} differ: "
            f"{', '.join(differing[:5])}"
        )
    return found
