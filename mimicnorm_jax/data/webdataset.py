"""Images in tar files, as WebDataset writes them, read where they lie: by an index."""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import re
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax import kept
from mimicnorm_jax.data.layout import USUAL_SPLITS, other_names
from mimicnorm_jax.data.listing import IMAGE_SUFFIXES, said_of
from mimicnorm_jax.data.sources import EncodedSource, View, by_class_and_name, digest
from mimicnorm_jax.errors import UserError, first_line, refused_by_system, unknown
from mimicnorm_jax.progress_bar import progress_bar

CLASSES = "classes.txt"
LABEL_FIELD = "label"
_DIGESTED = 100
_MOST_OF_A_LABEL = 2**20  # bytes


class Sample(NamedTuple):
    """An image in a tar file.

    Attributes:
      split: that it belongs to.
      label: the number or the name of its class.
      name: its path in the tar file.
      file: the number of the tar file.
      offset: where its bytes begin.
      size: how many they are.
    """

    split: str
    label: int | str
    name: str
    file: int
    offset: int
    size: int


class _Contents(NamedTuple):
    """The images of a tar file, and how many other files it has of each kind."""

    samples: list[Sample]
    left_out: collections.Counter[str]


def tars_in(place: pathlib.Path) -> list[pathlib.Path]:
    """The tar files in a folder and in those in it, sorted; or the one that is given.

    Raises:
      UserError: they are compressed, so that nothing in them can be found without reading all.
      OSError: the system refuses.
    """
    candidates = [place] if place.is_file() else sorted(place.glob("**/*.tar"))
    found = [path for path in candidates if path.is_file()]  # a pipe would be waited for
    if not found:
        packed = [*sorted(place.glob("**/*.tar.*")), *sorted(place.glob("**/*.tgz"))]
        if packed:
            raise UserError(f"{packed[0]} is compressed; unpack it to a .tar, or the images in it")
    return found


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
        chosen = np.linspace(0, len(self) - 1, min(_DIGESTED, len(self))).astype(int)
        told = [os.fsencode(name) + b"\n" for name in (*self._names, *self.class_names)]
        contents = [self.read(index)[0] for index in chosen.tolist()]
        return digest([*told, self.labels.astype("<i4"), self._places[:, 2].copy(), *contents])


def open_tars(data: ConfigDict, parts: Sequence[str]) -> list[TarSource]:
    """The tar files of ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them."""
    root = pathlib.Path(data.dir).expanduser()
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.exists():
            raise UserError(f"config.data.dir = {data.dir!r} does not exist")
        splits = read_tars(root, View.of(data))
    found = []
    for part in parts:
        wanted = data[f"{part}_split"]
        name = next((n for n in (wanted, *other_names(wanted)) if n in splits), None)
        if name is None:
            raise unknown(f"split of {root}", wanted, splits)
        if name != wanted:
            print(f"NOTE: in {root}, {name} for {wanted}", file=sys.stderr)
        found.append(splits[name])
    return found


def read_tars(place: pathlib.Path, view: View, field: str = LABEL_FIELD) -> dict[str, TarSource]:
    """All splits of a folder of tar files, in the order of classes and names.

    The classes are those of ``cls`` or ``json`` beside an image, or the folder in the tar file that
    an image is in. The names of numbers are the lines of ``classes.txt`` where that is there.

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
    samples: list[Sample] = []
    left_out: collections.Counter[str] = collections.Counter()
    for number, path in enumerate(progress_bar(tars, "indexing", len(tars), unit="file")):
        contents = _contents_of(path, field)
        samples += (sample._replace(file=number) for sample in contents.samples)
        left_out += contents.left_out
    if said := said_of(left_out):
        print(f"NOTE: left out in the tar files of {place}: {said}", file=sys.stderr)
    if not samples:
        raise UserError(f"the tar files of {place} have no images")
    class_names, labels = _classes(samples, place)
    found = {}
    for split in sorted({sample.split for sample in samples}):
        chosen = sorted(
            (index for index, sample in enumerate(samples) if sample.split == split),
            key=lambda index: by_class_and_name(int(labels[index]), samples[index].name),
        )
        found[split] = TarSource(
            tars, [samples[index] for index in chosen], labels[chosen], class_names, view
        )
    return found


def _contents_of(path: pathlib.Path, field: str) -> _Contents:
    what = f"images of {path.absolute()} by {field}"
    found, began = kept.recall(what), time.time()
    if found is None:
        found = _read_headers(path, field)
        kept.keep(what, found, began=began, depends_on=[path])
    samples, left_out = found
    return _Contents([Sample(*entry) for entry in samples], collections.Counter(left_out))


def _read_headers(path: pathlib.Path, field: str) -> _Contents:
    images: list[tuple[str, tarfile.TarInfo]] = []
    told: dict[str, int | str] = {}
    left_out: collections.Counter[str] = collections.Counter()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _regular(tar):
                key, suffix = _key_and_suffix(member.name)
                if suffix in IMAGE_SUFFIXES:
                    images.append((key, member))
                elif suffix in (".cls", ".json"):
                    label = _label(tar, member, suffix, field)
                    if label is not None and (suffix == ".cls" or key not in told):
                        told[key] = label
                else:
                    left_out[suffix or "no suffix"] += 1
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if inner := left_out[".tar"]:
        raise UserError(
            f"{path} has {inner} tar files in it; if it is ImageNet's own: python -m "
            f"mimicnorm_jax.tools.prepare_data imagenet2012 --manual-dir {path.parent}"
        )
    return _Contents(list(_samples(path, images, told, field)), left_out)


def _samples(
    path: pathlib.Path,
    images: Sequence[tuple[str, tarfile.TarInfo]],
    told: dict[str, int | str],
    field: str,
) -> Iterator[Sample]:
    keys = collections.Counter(key for key, _ in images)
    for key, member in images:
        split, folder = _folders(path, member.name)
        if told and keys[key] > 1:
            raise UserError(f"{path} has {keys[key]} images of {key}: it is not clear which")
        label = told.get(key) if told else folder
        if label is None or label == "":
            raise UserError(
                f"{path}: {member.name} has no class: no .cls, no {field!r} in its .json, and no "
                "folder"
            )
        yield Sample(split, label, member.name, 0, member.offset_data, member.size)


def _regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        name = member.name.rpartition("/")[2]
        if member.isreg() and not member.issparse() and not name.startswith((".", "__")):
            yield member


def _key_and_suffix(name: str) -> tuple[str, str]:
    """What the files of a sample have in common, and what kind of file one is.

    WebDataset cuts at the first dot of a file's name, and takes all behind it for the kind: a
    ``cat.v2.jpg`` is of the sample ``cat``. An image is one whatever else is before its suffix.
    """
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0], pathlib.PurePosixPath(last).suffix.lower()


def _label(
    tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, field: str
) -> int | str | None:
    if member.size > _MOST_OF_A_LABEL:
        raise ValueError(f"{member.name} has {member.size} bytes, which is no label")
    opened = tar.extractfile(member)
    assert opened is not None  # of a regular file
    text = opened.read().decode()
    if suffix == ".cls":
        text = text.strip()
        return int(text) if re.fullmatch(r"\d+", text) else text
    described = json.loads(text)
    label = described.get(field) if isinstance(described, dict) else None
    return label if isinstance(label, int | str) else None


def _folders(path: pathlib.Path, name: str) -> tuple[str, str]:
    """The split and the class that the folders in a tar file, or else its own name, tell."""
    *above, _ = name.removeprefix("./").split("/")
    split = next((part for part in above if part.lower() in USUAL_SPLITS), None)
    if split is None:
        words = [word for word in re.split("[^a-zA-Z]+", path.stem) if word]
        names = [word for word in (*words, path.parent.name) if word.lower() in USUAL_SPLITS]
        split = names[0] if names else "train"
    folder = above[-1] if above else ""
    return split, "" if folder == split else folder


def _classes(samples: Sequence[Sample], place: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the label of each sample."""
    kinds = {type(sample.label) for sample in samples}
    if len(kinds) > 1:
        raise UserError(f"the classes in {place} are numbers for some images and names for others")
    if str in kinds:
        names = sorted({str(sample.label) for sample in samples})
        numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
        return names, np.array([numbers[sample.label] for sample in samples], np.int32)
    labels = np.array([sample.label for sample in samples], np.int64)
    if labels.min() < 0:
        raise UserError(f"a label in {place} is {labels.min()}")
    names = _names(place if place.is_dir() else place.parent, int(labels.max()) + 1)
    return names, labels.astype(np.int32)


def _names(folder: pathlib.Path, count: int) -> list[str]:
    listed = folder / CLASSES
    if not listed.is_file():
        if count > 10**6:
            raise UserError(f"a label in {folder} is {count - 1}; that many classes there are not")
        return [f"{number:0{len(str(count - 1))}}" for number in range(count)]
    names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise UserError(
            f"{listed} has {len(set(names))} different names; the labels go to {count - 1}"
        )
    return names
