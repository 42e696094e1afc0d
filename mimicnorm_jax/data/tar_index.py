"""Where in tar files the images are, and what lies beside them."""

from __future__ import annotations

import collections
import json
import pathlib
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mimicnorm_jax import kept
from mimicnorm_jax.data.listing import IMAGE_SUFFIXES, is_class_folder
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.progress_bar import progress_bar

_MOST_OF_A_LABEL = 2**20  # bytes
_BLOCK = 512
_CHUNK = 2**20


class Sample(NamedTuple):
    """An image in a tar file.

    Attributes:
      name: its path in it.
      label: the number or the name of its class, where one lies beside it.
      file: the number of the tar file.
      offset: where its bytes begin.
      size: how many they are.
    """

    name: str
    label: int | str | None
    file: int
    offset: int
    size: int


class TarIndex(NamedTuple):
    """What some tar files have.

    Attributes:
      samples: the images, in the order of the files.
      left_out: how many other files there are, by their kinds.
      fields: of the ``json`` files; None where there are none.
    """

    samples: list[Sample]
    left_out: collections.Counter[str]
    fields: list[str] | None


def tars_in(place: pathlib.Path) -> list[pathlib.Path]:
    """The tar files in a folder and in those in it, sorted; or the one that is given.

    Raises:
      UserError: there are compressed ones only, in which nothing is found without reading all.
      OSError: the system refuses.
    """
    candidates = [place] if place.is_file() else sorted(place.glob("**/*"))
    files = [
        path
        for path in candidates
        if ".t" in path.name.lower() and not path.name.startswith(".") and path.is_file()
    ]  # a pipe would be waited for
    found = [path for path in files if path.suffix.lower() == ".tar"]
    packed = [path for path in files if re.search(r"\.(tar\.\w+|tgz|txz)$", path.name.lower())]
    if packed and not found:
        raise UserError(f"{packed[0]} is compressed; unpack it to a .tar, or the images in it")
    return found


def index_tars(tars: Sequence[pathlib.Path], field: str) -> TarIndex:
    """Looks through the headers of tar files, or recalls what was found in the same before.

    Args:
      tars: the files.
      field: of a ``json`` beside an image that has its label.

    Raises:
      UserError: a file is damaged, or it is not clear which image a label is of.
      OSError: the system refuses.
    """
    what = f"images by {field} of\n" + "\n".join(str(path.absolute()) for path in tars)
    began = time.time()
    if (known := kept.recall(what)) is not None:
        samples, left_out, fields = known
        return TarIndex([Sample(*each) for each in samples], collections.Counter(left_out), fields)
    index = TarIndex([], collections.Counter(), None)
    for number, path in enumerate(progress_bar(tars, "indexing", len(tars), unit="file")):
        one = _read_headers(path, number, field)
        index.samples.extend(one.samples)
        index.left_out.update(one.left_out)
        if one.fields is not None:
            index = index._replace(fields=sorted({*(index.fields or []), *one.fields}))
    kept.keep(what, index, began=began, depends_on=tars)
    return index


def _read_headers(path: pathlib.Path, number: int, field: str) -> TarIndex:
    images: dict[str, tuple[int, int]] = {}  # of each name, offset and size
    told: dict[str, int | str] = {}
    left_out: collections.Counter[str] = collections.Counter()
    fields: set[str] | None = None
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                end = member.offset_data
                end += member.size if member.isreg() else 0
                key, suffix = _key_and_suffix(member.name)
                if _is_hidden(member.name) or member.isdir():
                    continue
                if member.islnk() and member.linkname in images:
                    images[member.name] = images[member.linkname]
                elif not member.isreg() or member.issparse():
                    left_out["links" if member.issym() or member.islnk() else "irregular"] += 1
                elif suffix in IMAGE_SUFFIXES:
                    images[member.name] = member.offset_data, member.size
                elif suffix == ".cls":
                    told[key] = _number_or_name(_text(tar, member))
                elif suffix == ".json":
                    described = _described(_text(tar, member))
                    fields = (fields or set()) | set(list(described)[:20])
                    label = described.get(field)
                    if isinstance(label, int | str):
                        told.setdefault(key, int(label) if isinstance(label, bool) else label)
                else:
                    left_out[suffix or "no suffix"] += 1
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    _check_end(path, end)
    if inner := left_out[".tar"]:
        raise UserError(
            f"{path} has {inner} tar files in it; if it is ImageNet's own: python -m "
            f"mimicnorm_jax.tools.prepare_data imagenet2012 --manual-dir {path.parent}"
        )
    if told:
        _check_keys(path, images)
    samples = [
        Sample(name, told.get(_key_and_suffix(name)[0]), number, *place)
        for name, place in images.items()
    ]
    return TarIndex(samples, left_out, None if fields is None else sorted(fields))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        yield member
        tar.members = []  # type: ignore[attr-defined] # else all are kept, half a kilobyte each


def _check_keys(path: pathlib.Path, images: dict[str, tuple[int, int]]) -> None:
    keys = collections.Counter(_key_and_suffix(name)[0] for name in images)
    key, count = keys.most_common(1)[0] if keys else ("", 1)
    if count > 1:
        raise UserError(f"{path} has {count} images of {key}: it is not clear which")


def _check_end(path: pathlib.Path, end: int) -> None:
    """After the last file there are zeros only; a damaged header would end the list, too."""
    padded = -(-end // _BLOCK) * _BLOCK
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < end:
            raise UserError(f"{path} is damaged: it was cut off")
        file.seek(padded)
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise UserError(
                    f"{path} is damaged at byte {padded}, or it is several tar files one after the "
                    "other"
                )
            padded += len(chunk)


def _is_hidden(name: str) -> bool:
    *folders, last = name.removeprefix("./").split("/")
    return last.startswith(".") or not all(map(is_class_folder, folders))


def _key_and_suffix(name: str) -> tuple[str, str]:
    """What the files of a sample have in common, and what kind of file one is.

    WebDataset cuts at the first dot of a file's name, and takes all behind it for the kind: a
    ``cat.v2.jpg`` is of the sample ``cat``. An image is one whatever else is before its suffix.
    """
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0], pathlib.PurePosixPath(last).suffix.lower()


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _MOST_OF_A_LABEL:
        raise ValueError(f"{member.name} has {member.size} bytes, which is no label")
    opened = tar.extractfile(member)
    assert opened is not None  # of a regular file
    return opened.read().decode()


def _number_or_name(text: str) -> int | str:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,9}", text, re.ASCII) else text


def _described(text: str) -> dict[str, object]:
    described = json.loads(text)
    return described if isinstance(described, dict) else {}
