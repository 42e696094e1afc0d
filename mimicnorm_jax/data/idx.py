"""The gzip files of MNIST and of the data sets that copied its format."""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.images import centre_crop
from mimicnorm_jax.data.sources import ArraySource
from mimicnorm_jax.errors import UserError, refused_by_system

_UINT8 = 8
_PREFIXES = {"train": "train", "test": "t10k"}  # of the published file names


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array in an IDX file, gzipped or not.

    Args:
      path: the file; one of uint8.

    Returns:
      uint8, of the shape that the file's header says.

    Raises:
      UserError: the file is missing, damaged, or no IDX file of bytes.
    """
    with refused_by_system(f"cannot read {path}"):
        try:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:3] != bytes((0, 0, _UINT8)) or not dimensions or len(content) < start:
        raise UserError(f"{path} is not an IDX file of bytes")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    expected = math.prod(shape)
    if len(content) - start != expected:
        raise UserError(
            f"{path} is damaged: its header says {expected} bytes, {len(content) - start} follow"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(root: pathlib.Path, name: str) -> pathlib.Path:
    for candidate in (root / f"{name}.gz", root / name):
        if candidate.is_file():
            return candidate
    raise UserError(f"{root / name}.gz is missing")


def read_split(root: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, H, W)`` and labels ``(N,)`` of a split, both uint8.

    Args:
      root: the folder.
      split: ``"train"``, ``"test"``, or a file name's beginning.

    Raises:
      UserError: a file is missing or damaged, or they do not belong together.
    """
    prefix = _PREFIXES.get(split, split)
    images_path = _find(root, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or not images.size or labels.shape != images.shape[:1]:
        raise UserError(
            f"{images_path} and {labels_path} do not belong together: images of shape "
            f"{images.shape}, labels of shape {labels.shape}"
        )
    return images, labels


def _open_split(root: pathlib.Path, split: str, size: int) -> ArraySource:
    images, labels = read_split(root, split)
    if images.shape[1:] != (size, size):
        images = np.stack([centre_crop(image, size, size) for image in images])
    names = [str(label) for label in range(max(10, int(labels.max()) + 1))]
    return ArraySource(images[..., None], labels, names)


def open_idx(data: ConfigDict, parts: Sequence[str]) -> list[ArraySource]:
    """The files in ``config.data.dir`` for ``"train"`` and ``"test"``, or one of them, in grey.

    A split that is named otherwise than ``train`` and ``test`` is a file name's beginning.
    """
    root = pathlib.Path(data.dir).expanduser()
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.is_dir():
            raise UserError(f"config.data.dir = {data.dir!r} is not a folder")
    found = [_open_split(root, data[f"{part}_split"], data.image_size) for part in parts]
    names = max((source.class_names for source in found), key=len)
    for source in found:
        source.class_names = names
    return found
