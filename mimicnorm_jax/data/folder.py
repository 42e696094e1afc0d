"""Images in class folders."""

from __future__ import annotations

import collections
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data import listing
from mimicnorm_jax.data.annotations import read_annotations
from mimicnorm_jax.data.labels_file import read_labels_file
from mimicnorm_jax.data.layout import annotations_of, find_layout
from mimicnorm_jax.data.sources import EncodedSource, View, digest, digested
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.paths import expanded

_NO_CLASS = "in no class folder"
_VERSION = 2  # of the identity; the first, which had none, was of names and sizes


class FilesSource(EncodedSource):
    """A split of image files whose classes are known.

    Args:
      directory: that the files are in.
      files: their paths below it, with ``/``.
      labels: of each file.
      class_names: the classes, in the order of the labels.
      view: what the images become.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        files: list[str],
        labels: np.ndarray,
        class_names: list[str],
        view: View,
    ):
        self.directory = directory
        self._files = files
        self.labels = labels
        super().__init__(class_names, view)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> pathlib.Path:
        """The file of an example."""
        return self.directory / self.name(index)

    def name(self, index: int) -> str:
        """Its path below ``directory``."""
        return self._files[index]

    @functools.cached_property
    def identity(self) -> str:
        # all names, and some contents: to read a million of them would take minutes
        names = (os.fsencode(name) + b"\n" for name in self._files)
        chosen = digested(len(self))
        with refused_by_system(f"cannot read the images in {self.directory}"):
            paths = map(self.path, chosen.tolist())
            contents = [digest([path.read_bytes()]).encode() for path in paths]
        return f"{_VERSION}:{digest([*names, *contents, *self._told()])}"

    def _told(self) -> list[bytes | np.ndarray]:
        """What the names of the files do not say of their classes."""
        return [
            self.labels.astype("<i4"),
            *(os.fsencode(name) + b"\n" for name in self.class_names),
        ]

    def read(self, index: int) -> tuple[bytes, int]:
        return self.path(index).read_bytes(), int(self.labels[index])

    def describe(self, index: int) -> str:
        return str(self.path(index))


class FolderSource(FilesSource):
    """A split stored as ``directory/<class>/*.jpg``, with images of every type that is decoded.

    Folders in a class folder are part of the class. What is left out is said in one line.

    Args:
      directory: the split's folder.
      view: what the images become.
      for_training: one class, or a class without images, is an error; False leaves out classes
        without images.

    Raises:
      UserError: a folder that does not exist or may not be read, or has no images; a link to
        nowhere; or, for training, fewer than two class folders or one without images.
    """

    def __init__(self, directory: str | pathlib.Path, view: View, *, for_training: bool = True):
        place = pathlib.Path(directory)
        files: list[str] = []
        class_names: list[str] = []
        counts: list[int] = []
        empty: list[str] = []
        left_out: collections.Counter[str] = collections.Counter()
        with refused_by_system(f"cannot read folder {directory}"):
            listed = _list_classes(place, for_training)
        for name, found in listed.folders.items():
            left_out += found.left_out
            if not found.files:
                if for_training:
                    raise UserError(_without_images(place / name, found))
                empty.append(name)
                continue
            class_names.append(name)
            counts.append(len(found.files))
            files += [f"{name}/{inner}" for inner in found.files]
        left_out[_NO_CLASS] = listed.beside
        if not files:
            raise UserError(f"the class folders of {directory} have no images")
        if empty:
            print(f"NOTE: without images in {directory}: {', '.join(empty)}", file=sys.stderr)
        _say_left_out(place, left_out)
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        super().__init__(place, files, labels, class_names, view)

    def _told(self) -> list[bytes | np.ndarray]:
        return []


def _list_classes(directory: pathlib.Path, for_training: bool) -> listing.Classes:
    expected = f"expected {directory}/<class>/*.jpg"
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; {expected}")
    found = listing.list_classes(directory)
    if not found.folders:
        raise UserError(f"{directory} has no class folders; {expected}")
    if len(found.folders) == 1 and for_training:
        (only,) = found.folders
        raise UserError(f"{directory} has a single class, {only}: nothing to learn; {expected}")
    return found


def _say_left_out(directory: pathlib.Path, left_out: collections.Counter[str]) -> None:
    if said := listing.said_of(+left_out):
        print(f"NOTE: left out in {directory}: {said}", file=sys.stderr)


def annotated(directory: pathlib.Path, annotations: pathlib.Path, view: View) -> FilesSource:
    """A split whose images are in one folder, and whose classes a file tells.

    Args:
      directory: the split's folder.
      annotations: see ``find_annotations``.
      view: what the images become.

    Raises:
      UserError: the file is damaged, or tells of other images.
    """
    classes = read_annotations(annotations)
    with refused_by_system(f"cannot read folder {directory}"):
        found = listing.list_class(directory)
    names = {name: name.rpartition("/")[2].rpartition(".")[0] for name in found.files}
    files = [name for name in found.files if names[name] in classes]
    if not files:
        raise UserError(f"{annotations} tells the class of no image in {directory}")
    left_out = found.left_out - collections.Counter({annotations.suffix: 1})
    left_out[_NO_CLASS] = len(found.files) - len(files)
    _say_left_out(directory, left_out)
    class_names = sorted(set(classes.values()))
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers[classes[names[name]]] for name in files], np.int32)
    return FilesSource(directory, files, labels, class_names, view)


def _without_images(folder: pathlib.Path, found: listing.ClassFolder) -> str:
    said = listing.said_of(found.left_out)
    what = f"no image that can be read, but {said}" if said else "no images"
    return f"class folder {folder} has {what}"


def _open(directory: pathlib.Path, view: View, for_training: bool) -> FilesSource:
    annotations = annotations_of(directory)
    if annotations is not None:
        print(f"NOTE: the classes of {directory} are those in {annotations}", file=sys.stderr)
        return annotated(directory, annotations, view)
    return FolderSource(directory, view, for_training=for_training)


def _open_table(data: ConfigDict, parts: Sequence[str]) -> list[FilesSource]:
    table, root = read_labels_file(data), expanded(data.dir)
    class_names = sorted(set(table.classes.values()))
    numbers = {name: number for number, name in enumerate(class_names)}
    if not table.splits and not data.holdout:
        raise UserError(
            f"config.data.labels_file = {data.labels_file!r} tells no splits: to test on a tenth "
            "of each class, --config.data.holdout=0.1"
        )
    found = []
    for part in parts:
        files = table.of_split(data[f"{part}_split"]) if table.splits else sorted(table.classes)
        if not files:
            raise UserError(
                f"config.data.labels_file = {data.labels_file!r} has no images of the split "
                f"{data[f'{part}_split']}, but of {', '.join(sorted(set(table.splits.values())))}"
            )
        labels = np.array([numbers[table.classes[name]] for name in files], np.int32)
        found.append(FilesSource(root, files, labels, class_names, View.of(data)))
    return found


def open_folders(data: ConfigDict, parts: Sequence[str]) -> list[FilesSource]:
    """The folders of ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them."""
    if data.labels_file:
        return _open_table(data, parts)
    layout = find_layout(data)
    if len(parts) > 1 and layout.train is not None and layout.test is None:
        raise UserError(
            f"config.data.dir = {data.dir!r} has no folder {data.test_split}; to test on a tenth "
            "of each training class: --config.data.test_split= --config.data.holdout=0.1"
        )
    if layout.said:
        print(f"NOTE: {layout.said}", file=sys.stderr)
    found = [_open(layout.folder(part, data), View.of(data), "train" in parts) for part in parts]
    first, last = found[0], found[-1]
    if first.class_names != last.class_names:
        differing = sorted(set(first.class_names) ^ set(last.class_names))
        raise UserError(
            f"the classes of {first.directory} and {last.directory} differ: "
            f"{', '.join(differing[:5])}"
        )
    return found
