"""Images in tar files, as WebDataset writes them, read where they lie: by an index."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.layout import chosen_split, split_of
from mimicnorm_jax.data.listing import said_of
from mimicnorm_jax.data.sources import EncodedSource, View, by_class_and_name, digest, digested
from mimicnorm_jax.data.tar_index import Sample, index_tars, tars_in
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.paths import expanded

CLASSES = "classes.txt"
LABEL_FIELD = "label"
_SECRET = -1  # in the place of a label, as test images are published


class TarSource(EncodedSource):
    """A split of images in tar files.

    Args:
      tars: the files.
      samples: the images of the split.
      labels: of each.
      class_names: the classes, in the order of the labels.
      view: what the images become.
    """

    def __init__(
        self,
        tars: Sequence[pathlib.Path],
        samples: Sequence[Sample],
        labels: np.ndarray,
        class_names: list[str],
        view: View,
    ):
        self._tars = list(tars)
        self._names = [sample.name for sample in samples]
        places = [(sample.file, sample.offset, sample.size) for sample in samples]
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.labels = labels
        super().__init__(class_names, view)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Its path in the tar file."""
        return self._names[index]

    def read(self, index: int) -> tuple[bytes, int]:
        number, offset, size = self._places[index].tolist()
        with self._tars[number].open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError("the tar file ends before")
        return data, int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"{self._names[index]} of {self._tars[self._places[index, 0]]}"

    @functools.cached_property
    def identity(self) -> str:
        told = [os.fsencode(name) + b"\n" for name in (*self._names, *self.class_names)]
        with refused_by_system(f"cannot read {self._tars[0]} and its like"):
            contents = [self.read(index)[0] for index in digested(len(self)).tolist()]
        return digest([*told, self.labels.astype("<i4"), self._places[:, 2].copy(), *contents])


def open_tars(data: ConfigDict, parts: Sequence[str]) -> list[TarSource]:
    """The tar files of ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them."""
    root = expanded(data.dir)
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.exists():
            raise UserError(f"config.data.dir = {data.dir!r} does not exist")
        splits = read_tars(root, View.of(data))
    found = [splits[chosen_split(data, part, splits, str(root))] for part in parts]
    if "train" in parts and len(found[0].class_names) == 1:
        raise UserError(f"{root} has a single class, {found[0].class_names[0]}: nothing to learn")
    return found


def read_tars(place: pathlib.Path, view: View, field: str = LABEL_FIELD) -> dict[str, TarSource]:
    """All splits of a folder of tar files, in the order of classes and names.

    The classes are those of ``cls`` or ``json`` beside an image; where no tar file has these, the
    folders in the tar files that the images are in. The names of numbers are the lines of
    ``classes.txt`` where that is there.

    Args:
      place: the folder, or a tar file.
      view: what the images become.
      field: of the ``json``.

    Raises:
      UserError: there are no tar files; one is damaged; or an image has no class.
      OSError: the system refuses.
    """
    tars = tars_in(place)
    if not tars:
        raise UserError(f"{place} has no .tar files")
    index = index_tars(tars, field)
    if said := said_of(index.left_out):
        print(f"NOTE: left out in the tar files of {place}: {said}", file=sys.stderr)
    if not index.samples:
        raise UserError(f"the tar files of {place} have no images")
    splits = _splits(index.samples, tars, place)
    labels_told = [sample.label for sample in index.samples]
    if all(label is None for label in labels_told):
        if index.fields is not None:
            there = f"; there are {', '.join(index.fields)}" if index.fields else ""
            raise UserError(f"no .json in {place} has a label in {field!r}{there}")
        labels_told = list(_folders(index.samples, splits))
    for sample, label in zip(index.samples, labels_told, strict=True):
        if label is None or label == "":
            where = tars[sample.file]
            raise UserError(
                f"{where}: {sample.name} has no class: no .cls, no {field!r} in its .json, and no "
                "folder, or others have labels"
            )
    return _sources(tars, index.samples, labels_told, splits, place, view)


def _sources(
    tars: Sequence[pathlib.Path],
    samples: Sequence[Sample],
    told: Sequence[Any],
    splits: Sequence[str],
    place: pathlib.Path,
    view: View,
) -> dict[str, TarSource]:
    of_split: dict[str, list[int]] = {}
    for number, split in enumerate(splits):
        of_split.setdefault(split, []).append(number)
    for split in sorted(of_split):
        if all(told[number] == _SECRET for number in of_split[split]):
            print(f"NOTE: split {split} has no labels: left out", file=sys.stderr)
            del of_split[split]
    if not of_split:
        return {}
    class_names, labels = _classes({told[n] for every in of_split.values() for n in every}, place)
    found = {}
    for split, members in sorted(of_split.items()):
        members.sort(key=lambda n: by_class_and_name(labels[told[n]], samples[n].name))
        chosen = np.array([labels[told[n]] for n in members], np.int32)
        found[split] = TarSource(tars, [samples[n] for n in members], chosen, class_names, view)
    return found


def _splits(
    samples: Sequence[Sample], tars: Sequence[pathlib.Path], place: pathlib.Path
) -> list[str]:
    """The split of each sample, by the folders in its tar file, or by the names of that."""
    root = place if place.is_dir() else place.parent
    of_tars = [split_of([*path.relative_to(root).parts[:-1], path.stem]) for path in tars]
    found = []
    for sample in samples:
        folders = [part for part in sample.name.split("/")[:-1] if part != "."]
        inner = next((split for part in folders if (split := split_of([part], whole=True))), None)
        found.append(inner or of_tars[sample.file])
    if None in found and any(found):
        without = tars[samples[found.index(None)].file]
        raise UserError(f"{without} tells no split, and other tar files do: rename or move it")
    return [split or "train" for split in found]


def _folders(samples: Sequence[Sample], splits: Sequence[str]) -> list[str]:
    """The class of each sample: the first folder below its split's, or below what all share."""
    below = []
    for sample, split in zip(samples, splits, strict=True):
        folders = [part for part in sample.name.split("/")[:-1] if part != "."]
        told = [split_of([part], whole=True) for part in folders]
        below.append(folders[told.index(split) + 1 :] if split in told else folders)
    shared = 0
    while all(folders[: shared + 1] == below[0][: shared + 1] != [] for folders in below):
        if shared >= len(below[0]):
            break
        shared += 1
    return [(folders[shared:] or [""])[0] for folders in below]


def _classes(told: set[Any], place: pathlib.Path) -> tuple[list[str], Mapping[Any, int]]:
    """Names of the classes, and the number of each label."""
    if all(isinstance(label, str) for label in told):
        names = sorted(told)
        return names, {name: number for number, name in enumerate(names)}
    if any(isinstance(label, str) for label in told):
        raise UserError(f"the classes in {place} are numbers for some images and names for others")
    if min(told) < 0:
        raise UserError(f"a label in {place} is {min(told)}")
    names = _names(place if place.is_dir() else place.parent, max(told) + 1)
    return names, {number: number for number in range(len(names))}


def _names(folder: pathlib.Path, count: int) -> list[str]:
    listed = folder / CLASSES
    if not listed.is_file():
        if count > 10**6:
            raise UserError(f"a label in {folder} is {count - 1}; that many classes there are not")
        return [f"{number:0{len(str(count - 1))}}" for number in range(count)]
    try:
        lines = listed.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{listed} is no text in UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise UserError(
            f"{listed} has {len(set(names))} different names; the labels go to {count - 1}"
        )
    return names
