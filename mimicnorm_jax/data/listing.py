"""The image files of class folders, by their names: only one without a suffix is looked into."""

from __future__ import annotations

import collections
import errno
import os
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

from mimicnorm_jax import kept
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.progress_bar import progress_bar

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp", ".avif", ".bmp", ".dib"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_NO_CLASSES = frozenset(  # what systems and programs leave, beside what begins with a dot
    {
        *("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@tmp", "#recycle", "lost+found"),
        *("$RECYCLE.BIN", "System Volume Information"),
    }
)
_NO_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})
_BEGINNINGS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"RIFF",
    b"P5",
    b"P6",
)
BROKEN, IRREGULAR = "broken links", "no regular files"


class ClassFolder(NamedTuple):
    """What is in the folder of a class.

    Attributes:
      files: the images' paths below it, with ``/``, sorted.
      left_out: how many files are no images that can be read, by their suffix.
      folders: it and those in it, all paths.
    """

    files: list[str]
    left_out: collections.Counter[str]
    folders: list[str]


class Classes(NamedTuple):
    """What is in the folder of a split.

    Attributes:
      folders: of the classes, by their names, sorted.
      beside: the number of images beside them.
    """

    folders: dict[str, ClassFolder]
    beside: int


def is_class_folder(name: str) -> bool:
    """Whether a folder may be one of a class, by its name."""
    return not name.startswith(".") and name not in _NO_CLASSES


def folders_in(directory: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder that may be of classes, sorted by name.

    Raises:
      UserError: a link leads nowhere, or to itself.
      OSError: the system refuses.
    """
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_class_folder(entry.name) and _is_folder(entry):
                found.append(directory / entry.name)
    return sorted(found)


def list_class(folder: pathlib.Path) -> ClassFolder:
    """The images of a class: all in its folder, and in folders in it.

    Raises:
      UserError: a link leads nowhere, or to a folder that it is in.
      OSError: the system refuses.
    """
    listed = ClassFolder([], collections.Counter(), [])
    _list(str(folder), "", listed, ())
    listed.files.sort()
    return listed


def list_classes(directory: pathlib.Path) -> Classes:
    """The classes of a split; kept for the next time, where it takes long.

    Raises:
      UserError: as ``folders_in`` and ``list_class``.
      OSError: the system refuses.
    """
    what = f"class folders of {directory.absolute()}"
    if (known := kept.recall(what)) is not None:
        folders, beside = known
        return Classes({name: _recalled(*entry) for name, entry in folders.items()}, beside)
    began = time.time()
    places = folders_in(directory)
    shown = progress_bar(places, f"listing {directory.name}", len(places), unit="class")
    found = Classes({folder.name: list_class(folder) for folder in shown}, count_images(directory))
    inner = (path for folder in found.folders.values() for path in folder.folders)
    kept.keep(what, found, began=began, depends_on=[directory, *inner])
    return found


def _recalled(files: list[str], left_out: dict[str, int], folders: list[str]) -> ClassFolder:
    return ClassFolder(files, collections.Counter(left_out), folders)


def count_images(folder: pathlib.Path) -> int:
    """The number of images right in a folder, not in folders in it."""
    with os.scandir(folder) as entries:
        return sum(not entry.name.startswith(".") and not _kind(entry) for entry in entries)


def said_of(left_out: collections.Counter[str]) -> str:
    """Such as ``.heic (12), .txt (2)``."""
    return ", ".join(f"{kind} ({count})" for kind, count in left_out.most_common())


def _list(folder: str, below: str, listed: ClassFolder, above: Sequence[tuple[int, int]]) -> None:
    listed.folders.append(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            # most are images: a folder that is called like one is found by its kind
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in _SUFFIXES and _is_folder(entry):
                if name in _NO_CLASSES:
                    continue
                status = entry.stat()
                me = (status.st_dev, status.st_ino)
                if me in above:
                    raise UserError(f"{entry.path} is a link to a folder that it is in")
                _list(entry.path, f"{below}{name}/", listed, (*above, me))
                continue
            kind = _kind(entry, suffix)
            if not kind:
                listed.files.append(below + name)
            elif name.lower() not in _NO_FILES:
                listed.left_out[kind] += 1


def _kind(entry: os.DirEntry[str], suffix: str | None = None) -> str:
    """What a file is that is no image that can be read; ``""`` of an image."""
    if suffix is None:
        suffix = os.path.splitext(entry.name)[1].lower()
    try:
        is_file = entry.is_file()
    except OSError:  # a link to itself
        is_file = False
    if not is_file:
        return BROKEN if entry.is_symlink() else IRREGULAR
    if suffix in _SUFFIXES or (not suffix and _begins_as_an_image(entry.path)):
        return ""
    return suffix or "no suffix"


def _begins_as_an_image(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(16).startswith(_BEGINNINGS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_dir():
            return True
        dead = entry.is_symlink() and not os.path.exists(entry.path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{entry.path} is a link to itself") from error
    if dead and not os.path.splitext(entry.name)[1]:
        raise UserError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there")
    return False
