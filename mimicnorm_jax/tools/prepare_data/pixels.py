"""Data sets that are published as arrays of pixels: SVHN, STL-10, and those in MNIST's format."""

from __future__ import annotations

import glob
import pathlib
from collections.abc import Sequence

import numpy as np

from mimicnorm_jax.data import idx
from mimicnorm_jax.data.layout import split_of
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.tools.prepare_data.records import Pixels, Records

SVHN = ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat")
STL10 = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
_STL_SHAPE = (3, 96, 96)


def read_svhn(folder: pathlib.Path) -> dict[str, Records]:
    """The splits of SVHN's cropped digits that are there; a digit 0, whose label is 10, becomes 0.

    Raises:
      UserError: a file is damaged.
    """
    from scipy.io import loadmat  # slow to import

    found: dict[str, Records] = {}
    for path in (folder / name for name in SVHN):
        if not path.is_file():
            continue
        try:
            content = loadmat(str(path), variable_names=["X", "y"])
            images, labels = content["X"], content["y"].ravel()
        except Exception as error:  # whatever damaged bytes make of it
            raise UserError(f"{path} is damaged: {first_line(error)}") from error
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[2:] != (3, len(labels)):
            raise UserError(f"{path} is not of SVHN: X {images.shape}, y {labels.shape}")
        labels = _counted_from(1, labels, 10, path) % 10
        digits = [str(digit) for digit in range(10)]
        split = path.name.partition("_")[0]
        found[split] = Pixels(images.transpose(3, 0, 1, 2), labels, digits)
    return found


def _counted_from(first: int, labels: np.ndarray, count: int, path: pathlib.Path) -> np.ndarray:
    if not len(labels) or labels.min() < first or labels.max() >= first + count:
        raise UserError(f"{path} has labels that are not {first} to {first + count - 1}")
    return labels.astype(np.int64)


def read_stl10(folder: pathlib.Path) -> dict[str, Records]:
    """STL-10's training and test images; those without labels are left out.

    Raises:
      UserError: a file is missing or damaged.
    """
    names_file = folder / "class_names.txt"
    names = names_file.read_text().split() if names_file.is_file() else []
    names = names if len(names) == 10 else [str(number) for number in range(1, 11)]
    found: dict[str, Records] = {}
    for split in ("train", "test"):
        images_file, labels_file = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
        for path in (images_file, labels_file):
            if not path.is_file():
                raise UserError(f"{path} is missing")
        pixels, labels = np.fromfile(images_file, np.uint8), np.fromfile(labels_file, np.uint8)
        if len(pixels) != len(labels) * np.prod(_STL_SHAPE):
            raise UserError(
                f"{images_file} and {labels_file} do not belong together: {len(pixels)} bytes of "
                f"images, {len(labels)} labels"
            )
        labels = _counted_from(1, labels, 10, labels_file) - 1
        # columns lie in the file one after the other
        found[split] = Pixels(pixels.reshape(-1, *_STL_SHAPE).transpose(0, 3, 2, 1), labels, names)
    return found


def read_idx_files(place: pathlib.Path) -> dict[str, Records]:
    """The splits in MNIST's format.

    Args:
      place: the folder, or in it the beginning of the files' names, such as ``emnist-letters``.

    Raises:
      UserError: a file is missing or damaged; or there are several data sets.
    """
    folder, chosen = (place, "") if place.is_dir() else (place.parent, place.name)
    sets = idx_sets(folder, chosen)
    if len(sets) > 1:
        raise UserError(
            f"{folder} has several data sets: {', '.join(sets)}; say which: "
            f"{folder / next(iter(sets))}"
        )
    found: dict[str, Records] = {}
    names: Sequence[str] = ()
    for split, prefix in next(iter(sets.values())).items():
        images, labels = idx.read_split(folder, prefix)
        names = max(names, idx.names_of(folder, prefix, int(labels.max()) + 1), key=len)
        found[split] = Pixels(images, labels, names)
    for records in found.values():
        records.class_names = list(names)
    return found


def idx_sets(folder: pathlib.Path, chosen: str = "") -> dict[str, dict[str, str]]:
    """Data sets in MNIST's format in a folder: of each the beginnings of its splits' names."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob(f"{glob.escape(chosen)}*{idx.IMAGES}*")):
        prefix = path.name.partition(idx.IMAGES)[0]
        name, _, last = prefix.rpartition("-")
        split = {"t10k": "test"}.get(last) or split_of([last], whole=True)
        if split is not None:
            found.setdefault(name, {})[split] = prefix
    return found
