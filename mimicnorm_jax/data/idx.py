"""The gzip files of MNIST and of the data sets that copied its format."""

from __future__ import annotations

import gzip
import io
import math
import pathlib
import sys
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.images import centre_crop
from mimicnorm_jax.data.sources import ArraySource
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.paths import expanded

_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}
_PREFIXES = {"train": "train", "test": "t10k"}  # of the published file names
IMAGES = "-images-idx3-ubyte"
_MOST_CLASSES = 10**4
_LABELS = ("-labels-idx1-ubyte", "-labels-idx2-int")  # the second of QMNIST


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array in an IDX file, gzipped or not.

    No more is unpacked than the header announces.

    Args:
      path: the file; one of uint8 or int32.

    Returns:
      Of the shape that the file's header says.

    Raises:
      UserError: the file is missing, damaged, or no IDX file of these types.
    """
    with refused_by_system(f"cannot read {path}"):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file")
        with path.open("rb") as file:
            try:
                return _array(gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, path)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is damaged: {error}") from error


def _array(file: BinaryIO | gzip.GzipFile, path: pathlib.Path) -> np.ndarray:
    beginning = file.read(4)
    dimensions = beginning[3] if len(beginning) == 4 else 0
    dtype = _TYPES.get(beginning[2]) if beginning[:2] == b"\0\0" and dimensions else None
    extents = file.read(4 * dimensions)
    if dtype is None or len(extents) < 4 * dimensions:
        raise UserError(f"{path} is not an IDX file of bytes or whole numbers")
    shape = tuple(int(n) for n in np.frombuffer(extents, ">u4"))
    announced = math.prod(shape) * dtype.itemsize
    content = _read(file, announced)
    if len(content) < announced or file.read(1):
        follow = f"{len(content)} follow" if len(content) < announced else "more follow"
        raise UserError(f"{path} is damaged: its header says {announced} bytes, {follow}")
    return np.frombuffer(content, dtype).reshape(shape)


def _read(file: BinaryIO | gzip.GzipFile, count: int) -> bytes:
    """As many bytes, or what there is: an announced number may be any."""
    content = io.BytesIO()
    while (left := count - content.tell()) > 0 and (part := file.read(min(left, 1 << 24))):
        content.write(part)
    return content.getvalue()


def _find(root: pathlib.Path, prefix: str, kinds: Sequence[str]) -> pathlib.Path:
    for name in (f"{prefix}{kind}{suffix}" for kind in kinds for suffix in (".gz", "")):
        if (root / name).is_file():
            return root / name
    others = sorted({path.name.partition(IMAGES)[0] for path in root.glob(f"*{IMAGES}*")})
    hint = ""
    if others:
        hint = (
            f"; there are files of {', '.join(others)}, which --config.data.train_split and "
            "--config.data.test_split choose"
        )
    raise UserError(f"{root / prefix}{kinds[0]}.gz is missing{hint}")


def read_split(root: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(N, H, W)`` and labels ``(N,)`` of a split.

    EMNIST's images, which lie on their side in its files, are upright; its letters count from 0.

    Args:
      root: the folder.
      split: ``"train"``, ``"test"``, or a file name's beginning, such as ``"emnist-letters-train"``
        or ``"qmnist-train"``.

    Raises:
      UserError: a file is missing or damaged, or they do not belong together.
    """
    prefix = _PREFIXES.get(split, split)
    images_path = _find(root, prefix, (IMAGES,))
    labels_path = _find(root, prefix, _LABELS)
    images, labels = read_idx(images_path), read_idx(labels_path)
    labels = labels.astype(np.int64)
    if labels.ndim == 2 and labels.shape[1]:  # QMNIST's have the class in the first column
        labels = labels[:, 0]
    if (
        images.ndim != 3
        or not images.size
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
    ):
        raise UserError(
            f"{images_path} and {labels_path} do not belong together: images of shape "
            f"{images.shape}, labels of shape {labels.shape}"
        )
    if _is_emnist(prefix):
        images = images.swapaxes(1, 2)
        if "letters" in prefix:
            labels = labels - 1
    if not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise UserError(f"{labels_path} has labels of {labels.min()} to {labels.max()}")
    return images, labels


def _is_emnist(prefix: str) -> bool:
    return "emnist" in prefix.lower()


def names_of(root: pathlib.Path, prefix: str, count: int) -> list[str]:
    """Names of the classes: those of EMNIST's mapping where that is there, else their numbers.

    Args:
      root: the folder.
      prefix: a file name's beginning.
      count: of the classes that have examples.

    Raises:
      UserError: the mapping is damaged.
    """
    mapping = root / f"{prefix.rpartition('-')[0]}-mapping.txt"
    if _is_emnist(prefix) and mapping.is_file():
        with refused_by_system(f"cannot read {mapping}"):
            rows = [line.split() for line in mapping.read_text().splitlines() if line.strip()]
        try:
            names = [chr(int(code)) for _, code, *_ in rows]
        except ValueError as error:
            raise UserError(f"{mapping} is damaged: {error}") from error
        if len(set(names)) == len(names) >= count:
            return names
    return [str(label) for label in range(max(10, count))]


def _open_split(root: pathlib.Path, split: str, size: int) -> ArraySource:
    images, labels = read_split(root, split)
    prefix = _PREFIXES.get(split, split)
    if _is_emnist(prefix):
        print(f"NOTE: the images of {prefix} are turned upright, as EMNIST needs", file=sys.stderr)
    if images.shape[1:] != (size, size):
        images = np.stack([centre_crop(image, size, size) for image in images])
    names = names_of(root, prefix, int(labels.max()) + 1)
    return ArraySource(np.ascontiguousarray(images)[..., None], labels, names)


def open_idx(data: ConfigDict, parts: Sequence[str]) -> list[ArraySource]:
    """The files in ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them, in grey.

    A split that is named otherwise than ``train`` and ``test`` is a file name's beginning.
    """
    root = expanded(data.dir)
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.is_dir():
            raise UserError(f"config.data.dir = {data.dir!r} is not a folder")
    found = [_open_split(root, data[f"{part}_split"], data.image_size) for part in parts]
    names = max((source.class_names for source in found), key=len)
    for source in found:
        source.class_names = names
    return found
