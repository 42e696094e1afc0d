"""What is imported: splits of encoded images with labels and names."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mimicnorm_jax.data.sources import by_class_and_name, digest


class Records(Protocol):
    """A split of images as they are stored.

    Attributes:
      class_names: the classes, in the order of the labels.
    """

    class_names: list[str]

    @property
    def labels(self) -> np.ndarray:
        """Int32 ``(N,)``."""
        ...

    @property
    def channels(self) -> int:
        """1 where all images are grey, else 3."""
        ...

    @property
    def identity(self) -> str:
        """What tells these images from others, wherever they are stored."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The path of an image, as its source knows it."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label."""
        ...

    def describe(self, index: int) -> str:
        """Where an image is stored, for people."""
        ...


class Found(NamedTuple):
    """What a source has.

    Attributes:
      kind: such as ``"class folders"``.
      splits: by their names.
    """

    kind: str
    splits: Mapping[str, Records]


class Pixels:
    """Images that are stored as pixels; they become PNG files.

    Args:
      pixels: uint8 ``(N, H, W)`` or ``(N, H, W, 3)``.
      labels: integers ``(N,)``.
      class_names: the classes, in the order of the labels.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
        self._pixels = pixels
        self.labels = labels.astype(np.int32)
        self.class_names = list(class_names)
        self.channels = 1 if pixels.ndim == 3 else 3

    @functools.cached_property
    def identity(self) -> str:
        names = [name.encode() + b"\n" for name in self.class_names]
        return digest([str(self._pixels.shape).encode(), self._pixels, self.labels, *names])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{index:08}.png"

    def read(self, index: int) -> tuple[bytes, int]:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self._pixels[index])).save(file, "PNG")
        return file.getvalue(), int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"image {index}"


def order_of(records: Records) -> np.ndarray:
    """The indices of records by class, then by name, the same whatever they are stored in."""

    def place(index: int) -> tuple[int, str, str]:
        return by_class_and_name(int(records.labels[index]), records.name(index))

    return np.array(sorted(range(len(records)), key=place), np.int64)
