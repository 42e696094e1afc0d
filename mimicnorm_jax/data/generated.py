"""Data sets that need no files: real handwritten digits, and random images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.images import centre_crop
from mimicnorm_jax.data.sources import ArraySource

_DIGITS_TEST_EXAMPLES = 360


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 images ``(1797, 8, 8)`` in grey, and labels ``(1797,)``."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    raw = load_digits()
    return np.round(raw.images * (255 / 16)).astype(np.uint8), raw.target


def open_digits(data: ConfigDict, parts: Sequence[str]) -> list[ArraySource]:
    """The digits for ``"train"`` and ``"test"``, or one of them, split in strata."""
    from sklearn.model_selection import train_test_split  # slow to import as well

    grey, labels = read_digits()
    size = data.image_size
    images = np.stack([centre_crop(image, size, size) for image in grey])
    train, test = train_test_split(
        np.arange(len(grey)), test_size=_DIGITS_TEST_EXAMPLES, stratify=labels, random_state=0
    )
    names = [str(digit) for digit in range(10)]

    chosen = {"train": train, "test": test}
    return [
        ArraySource(images[chosen[part]][..., None], labels[chosen[part]], names) for part in parts
    ]


def open_synthetic(data: ConfigDict, parts: Sequence[str]) -> list[ArraySource]:
    """Random images with random labels, to time a step without data."""
    print(
        "WARNING: data.name = 'synthetic': images AND LABELS ARE RANDOM; "
        "no accuracy of this run means anything",
        file=sys.stderr,
    )
    generator = np.random.default_rng(0)
    names = [str(label) for label in range(data.num_classes)]

    def split(examples: int) -> ArraySource:
        shape = (examples, data.image_size, data.image_size, 3)
        images = generator.integers(0, 256, shape, np.uint8)
        return ArraySource(images, generator.integers(0, data.num_classes, examples), names)

    made = {"train": split(data.num_examples), "test": split(data.num_examples // 4)}
    return [made[part] for part in parts]
