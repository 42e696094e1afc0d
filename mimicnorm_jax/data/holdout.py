"""Images held out of training, which choose what the test images must not: the best checkpoint."""

from __future__ import annotations

import functools

import numpy as np

from mimicnorm_jax.data.sources import ArraySource, EncodedSource, Source, digest

_HOLDOUT_STREAM = 0x401D  # tells these random numbers from others of the same seed


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which examples are held out: of every class its share, and at least one.

    A class of a single example keeps it for training.

    Args:
      labels: integers ``(N,)``.
      share: of each class, in (0, 1).
      seed: decides which.

    Returns:
      bool ``(N,)``; the same with every version of NumPy.
    """
    raw = np.random.Philox(np.random.SeedSequence((seed, _HOLDOUT_STREAM))).random_raw(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        chosen[members[np.argsort(raw[members], kind="stable")[:count]]] = True
    return chosen


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The training split without some examples, and these.

    Args:
      source: the training split.
      share, seed: as for ``held_out``.

    Raises:
      UserError: an image cannot be read.
    """
    out = held_out(source.labels, share, seed)
    return _part(source, np.flatnonzero(~out)), _part(source, np.flatnonzero(out))


def _part(source: Source, indices: np.ndarray) -> Source:
    if isinstance(source, EncodedSource):
        return _EncodedPart(source, indices)
    assert isinstance(source, ArraySource)
    images, labels = source.images[indices], source.labels[indices]
    return ArraySource(images, labels, source.class_names, _identity(source, indices))


def _identity(source: Source, indices: np.ndarray) -> str:
    version, colon, _ = source.identity.rpartition(":")
    return version + colon + digest([source.identity.encode(), indices.astype("<i8")])


class _EncodedPart(EncodedSource):
    """Some examples of a source, which are decoded when asked for."""

    def __init__(self, whole: EncodedSource, indices: np.ndarray):
        super().__init__(whole.class_names, whole.view, channels=whole.image_shape[-1])
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def knows_labels(self) -> bool:
        return self._whole.knows_labels

    @property
    def labels(self) -> np.ndarray:
        return self._whole.labels[self._indices]

    def read(self, index: int) -> tuple[bytes, int]:
        return self._whole.read(self._indices[index])

    def describe(self, index: int) -> str:
        return self._whole.describe(self._indices[index])

    @functools.cached_property
    def identity(self) -> str:
        return _identity(self._whole, self._indices)
