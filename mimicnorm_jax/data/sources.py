"""What a data set is to the pipeline: random access to uint8 images and labels."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax import kept
from mimicnorm_jax.data import images
from mimicnorm_jax.data.images import CropChoice
from mimicnorm_jax.data.pillow import WHITE, Colour
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.progress_bar import progress_bar

_DIGESTED = 1000
_DIGEST_STREAM = 0x1D  # tells these random numbers from others


class Source(Protocol):
    """A split of a data set.

    Attributes:
      class_names: the classes, in the order of their labels.
      image_shape: ``(H, W, C)`` of every image.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]

    @property
    def identity(self) -> str:
        """What tells these examples from others, wherever they are stored.

        A digest; before it, where there were others, the version of how it is made and a colon.
        """
        ...

    @property
    def labels(self) -> np.ndarray:
        """Of all examples, int32 ``(N,)``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image, uint8 ``(H, W, C)``, and label of one example."""
        ...


class ArraySource:
    """A split that is in memory.

    Args:
      images: uint8 ``(N, H, W, C)``.
      labels: integers ``(N,)``.
      class_names: the classes, in the order of their labels.
      identity: see ``Source``; default: of the pixels and labels.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: list[str],
        identity: str | None = None,
    ):
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(f"a label is {wrong}; there are {len(class_names)} classes")
        self.images = images
        self._identity = identity
        self.labels = labels.astype(np.int32)
        self.class_names = class_names
        self.image_shape: tuple[int, int, int] = images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    @functools.cached_property
    def identity(self) -> str:
        if self._identity is not None:
            return self._identity
        return digest([str(self.image_shape).encode(), self.images, self.labels])


def by_class_and_name(label: int, name: str) -> tuple[int, str, str]:
    """Sorts examples the same, whatever they are stored in.

    Of a name, folders and what is behind the last dot count only where all else is the same.

    Args:
      label: of an example.
      name: its path, with ``/``.
    """
    last = name.rpartition("/")[2]
    return label, last.rpartition(".")[0] or last, name


def digest(parts: Iterable[bytes | np.ndarray]) -> str:
    """SHA-256 of all parts, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return sha.hexdigest()


def digested(count: int) -> np.ndarray:
    """Which of so many files, or parts of files, an identity has the contents of: at most 1,000."""
    if count <= _DIGESTED:
        return np.arange(count)
    raw = np.random.Philox(np.random.SeedSequence(_DIGEST_STREAM)).random_raw(_DIGESTED)
    return np.unique(raw % np.uint64(count)).astype(int)


@dataclasses.dataclass(frozen=True)
class View:
    """How the images of an ``EncodedSource`` become arrays of one size.

    Attributes:
      size: height and width in pixels.
      resize: the short side before the crop at the centre.
      upright: turn an image as its EXIF orientation says.
      background: what transparent images are put on, red, green and blue, 0 to 255.
    """

    size: int
    resize: int
    upright: bool
    background: Colour = WHITE

    @classmethod
    def of(cls, data: ConfigDict) -> View:
        """The view that ``config.data`` describes."""
        resize = data.resize or data.image_size
        return cls(data.image_size, resize, data.upright, tuple(data.background))


class EncodedSource(abc.ABC):
    """A split of image files, or records, that are decoded when asked for.

    Args:
      class_names: the classes, in the order of their labels.
      view: what the images become.
      channels: 3, or 1 where all images are grey.
    """

    def __init__(self, class_names: list[str], view: View, *, channels: int = 3):
        self.class_names = class_names
        self.view = view
        self.image_shape: tuple[int, int, int] = (view.size, view.size, channels)

    @property
    def channels(self) -> int:
        """1 where all images are grey, else 3."""
        return self.image_shape[-1]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Where an example is stored, for people."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """See ``Source``."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """See ``Source``. Where they are known beside the images, a subclass sets them."""
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda index: self.read(index)[1], range(len(self)))
            shown = progress_bar(found, "reading labels", len(self))
            return np.fromiter(shown, np.int32, len(self))

    @property
    def knows_labels(self) -> bool:
        """Whether ``labels`` are there without all examples being read."""
        return "labels" in vars(self)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The centre of an image, as in evaluation, and its label.

        Raises:
          UserError: the image is damaged, or its label is none; says where it is.
        """
        return self._example(index, self._centre())

    def cropped(self, index: int, choose: CropChoice) -> tuple[np.ndarray, int]:
        """A crop of an image, resized, and its label; raises ``UserError`` as above."""
        view = self.view
        options: dict[str, Any] = {"upright": view.upright, "background": view.background}
        return self._example(
            index, lambda data: images.decode_crop(data, choose, view.size, **options)
        )

    def roughly(self, index: int) -> np.ndarray:
        """The image as above, of which a large JPEG is decoded at a half, quarter or eighth."""
        return self._example(index, self._centre(at_least=self.view.resize))[0]

    def _centre(self, at_least: int | None = None) -> Callable[[bytes], np.ndarray]:
        view = self.view

        def centre(data: bytes) -> np.ndarray:
            whole = images.decode(
                data, upright=view.upright, background=view.background, at_least=at_least
            )
            return images.centre_crop(whole, view.size, view.resize)

        return centre

    def _example(self, index: int, decode: Callable[[bytes], np.ndarray]) -> tuple[np.ndarray, int]:
        try:
            data, label = self.read(index)
            image = decode(data)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes a decoder raise
            where = self.describe(index)
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = text.splitlines()[0]
            raise UserError(f"cannot read image {where}: {reason}") from error
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"the label of {self.describe(index)} is {label}; there are "
                f"{len(self.class_names)} classes"
            )
        return images.with_channels(image, self.image_shape[-1]), label


def cache(source: Source, *, description: str, workers: int = 8) -> ArraySource:
    """Decodes a whole split into memory, with a progress display.

    Args:
      source: the split.
      description: shown beside the progress.
      workers: decoding threads.
    """
    pixels = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def load(index: int) -> None:
        pixels[index], labels[index] = source[index]

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(load, range(len(source)))
        for _ in progress_bar(done, description, len(source), unit="image"):
            pass
    return ArraySource(pixels, labels, source.class_names, source.identity)


def channel_statistics(
    source: Source, *, at_most: int = 4000, workers: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, in units of 1.

    Args:
      source: the training split.
      at_most: a larger split that is not in memory is sampled at this many evenly spaced
        examples, see ``EncodedSource.roughly``; of photographs, whose means differ by 0.15, 4,000
        leave an error of 0.002. What is found is kept for the next start.
      workers: decoding threads.

    Returns:
      Two float64 arrays ``(C,)``.
    """
    if isinstance(source, EncodedSource):
        return _sampled_statistics(source, at_most, workers)
    assert isinstance(source, ArraySource)
    chunks = np.array_split(source.images, max(1, len(source) // 1000))
    return _mean_and_std(map(_sums, chunks))


def _sampled_statistics(
    source: EncodedSource, at_most: int, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    what = f"mean and std of {min(at_most, len(source))} of {source.identity} as {source.view}"
    if (known := kept.recall(what)) is not None:
        mean, std = known
        return np.array(mean), np.array(std)
    began = time.time()
    chosen = np.linspace(0, len(source) - 1, min(at_most, len(source))).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        sums = pool.map(lambda index: _sums(source.roughly(index)), chosen)
        shown = progress_bar(sums, "measuring mean and std", len(chosen), unit="image")
        mean, std = _mean_and_std(shown)
    kept.keep(what, [mean.tolist(), std.tolist()], began=began, depends_on=[])
    return mean, std


def _mean_and_std(parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> tuple[Any, Any]:
    counts, totals, squares = (sum(values) for values in zip(*parts, strict=True))
    mean = np.asarray(totals) / counts
    std = np.sqrt(np.maximum(np.asarray(squares) / counts - mean**2, 0.0))
    return mean, np.where(std > 0, std, 1.0)


def _sums(pixels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many pixels, and the sums of their channels and of the squares of these."""
    values = pixels.reshape(-1, pixels.shape[-1]) / 255.0
    return len(values), values.sum(0), np.square(values).sum(0)
