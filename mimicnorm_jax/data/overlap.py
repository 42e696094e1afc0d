"""Test images that are training images too."""

from __future__ import annotations

import hashlib
import sys
from typing import NamedTuple

import numpy as np

from mimicnorm_jax.data.folder import FilesSource
from mimicnorm_jax.data.sources import ArraySource, Source

_COMPARED = 1000  # test images, where they are not in memory
_WORTH_A_WORD = 0.01  # some data sets have a few duplicates, as published


class Overlap(NamedTuple):
    """How many of some test images are among the training images.

    Attributes:
      shared: of the test images that were compared, those that are training images.
      compared: how many were.
    """

    shared: int
    compared: int

    def __str__(self) -> str:
        count = "all" if self.shared == self.compared else f"{self.shared} of"
        compared = f"{self.compared} test images that were compared"
        return f"{count} {compared} are training images too"


def overlap(train: Source, test: Source) -> Overlap:
    """Compares test images with training images, by their content.

    In memory all are compared. Of files, 1,000 test images are, with the training image of the
    same name in the same class; of other sources none but whether both are the same.
    """
    if train.identity == test.identity:
        return Overlap(len(test), len(test))
    if isinstance(train, ArraySource) and isinstance(test, ArraySource):
        if train.image_shape != test.image_shape:
            return Overlap(0, 0)
        known = set(map(_digest, train.images))
        return Overlap(sum(_digest(image) in known for image in test.images), len(test))
    if isinstance(train, FilesSource) and isinstance(test, FilesSource):
        chosen = np.unique(np.linspace(0, len(test) - 1, min(_COMPARED, len(test))).astype(int))
        names = {
            train.name(index) for index in range(len(train))
        }  # a table's lie beside the test's
        shared = [i for i in chosen.tolist() if test.name(i) in names and _is_same(train, test, i)]
        return Overlap(len(shared), len(chosen))
    return Overlap(0, 0)


def warn_of_overlap(train: Source, test: Source) -> None:
    """Says on standard error that test images were seen in training, if some were."""
    found = overlap(train, test)
    if found.shared > _WORTH_A_WORD * found.compared:
        print(f"WARNING: {found}: the test accuracy will mean little", file=sys.stderr)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _is_same(train: FilesSource, test: FilesSource, index: int) -> bool:
    path, other = test.path(index), train.directory / test.name(index)
    try:
        if path.stat().st_size != other.stat().st_size:
            return False
        return path.read_bytes() == other.read_bytes()
    except OSError:  # what cannot be read is said when it is trained on
        return False
