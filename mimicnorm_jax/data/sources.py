"""Random-access sources of uint8 images and labels."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from tqdm import tqdm

from mimicnorm_jax.errors import UserError, refused_by_system, unknown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_DIGITS_TEST_EXAMPLES = 360


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
        """A digest that tells these examples from others, wherever they are stored."""
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
        return _digest([str(self.image_shape).encode(), self.images, self.labels])


def _digest(parts: Iterable[bytes | np.ndarray]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return sha.hexdigest()


class FolderSource:
    """A split stored as ``directory/<class>/*.{jpg,jpeg,png}``, decoded when asked for.

    Every image is turned upright (EXIF) and becomes 8-bit RGB; one that is not square of
    ``image_size`` is resized on its short side and cropped at the centre.

    Args:
      directory: the split's folder.
      image_size: height and width in pixels.

    Raises:
      UserError: a folder that does not exist or may not be read, has fewer than two
        class folders, or has a class folder without images.
    """

    def __init__(self, directory: str | pathlib.Path, image_size: int):
        self.directory = pathlib.Path(directory)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.class_names: list[str] = []
        self.paths: list[pathlib.Path] = []
        labels: list[int] = []
        with refused_by_system(f"cannot read folder {directory}"):
            for label, folder in enumerate(self._class_folders()):
                images = sorted(
                    path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
                )
                if not images:
                    suffixes = ", ".join(IMAGE_SUFFIXES)
                    raise UserError(f"class folder {folder} has no images ({suffixes})")
                self.class_names.append(folder.name)
                self.paths += images
                labels += [label] * len(images)
        self.labels = np.array(labels, np.int32)

    def _class_folders(self) -> list[pathlib.Path]:
        expected = f"expected {self.directory}/<class>/*.jpg"
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a folder; {expected}")
        folders = sorted(path for path in self.directory.iterdir() if path.is_dir())
        if not folders:
            raise UserError(f"{self.directory} has no class folders; {expected}")
        if len(folders) == 1:
            raise UserError(
                f"{self.directory} has a single class, {folders[0].name}: nothing to learn; "
                f"{expected}"
            )
        return folders

    @functools.cached_property
    def identity(self) -> str:
        # all names, and some sizes: asking for a million of them would take minutes
        names = (str(path.relative_to(self.directory)).encode() + b"\n" for path in self.paths)
        chosen = np.linspace(0, len(self) - 1, min(1000, len(self))).astype(int)
        sizes = np.array([self.paths[index].stat().st_size for index in chosen])
        return _digest([*names, sizes])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Decodes one image; raises ``UserError`` with its path if it is damaged."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                square = _square(_rgb(image), self.image_shape[0])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error).replace(str(path), "the file").splitlines()[0]
            raise UserError(f"cannot read image {path}: {reason}") from error
        return np.asarray(square, np.uint8), int(self.labels[index])


def _rgb(image: Image.Image) -> Image.Image:
    """The image upright, in 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def cache(source: Source, *, description: str, workers: int = 8) -> ArraySource:
    """Decodes a whole split into memory, with a progress display.

    Args:
      source: the split.
      description: shown beside the progress.
      workers: decoding threads.
    """
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def load(index: int) -> None:
        images[index], labels[index] = source[index]

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(load, range(len(source)))
        for _ in tqdm(
            done, description, len(source), unit="image", disable=not sys.stderr.isatty()
        ):
            pass
    return ArraySource(images, labels, source.class_names, source.identity)


def _digits(data: ConfigDict) -> tuple[Source, Source]:
    from sklearn.datasets import load_digits  # slow to import, and needed only here
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    size = data.image_size
    images = np.stack([np.asarray(_square(Image.fromarray(image), size)) for image in grey])
    train, test = train_test_split(
        np.arange(len(grey)), test_size=_DIGITS_TEST_EXAMPLES, stratify=raw.target, random_state=0
    )
    names = [str(digit) for digit in raw.target_names]

    def split(indices: np.ndarray) -> ArraySource:
        return ArraySource(images[indices][..., None], raw.target[indices], names)

    return split(train), split(test)


def _folder(data: ConfigDict) -> tuple[Source, Source]:
    root = pathlib.Path(data.dir).expanduser()
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.is_dir():
            raise UserError(f"config.data.dir = {data.dir!r} is not a folder")
    train, test = (
        FolderSource(root / split, data.image_size) for split in (data.train_split, data.test_split)
    )
    if train.class_names != test.class_names:
        differing = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(
            f"the classes of {root / data.train_split} and {root / data.test_split} differ: "
            f"{', '.join(differing[:5])}"
        )
    splits = []
    for name, split in ((data.train_split, train), (data.test_split, test)):
        gib = len(split) * np.prod(split.image_shape) / 2**30
        fits = gib <= data.cache_gib
        splits.append(cache(split, description=f"decoding {name}") if fits else split)
    return splits[0], splits[1]


def _synthetic(data: ConfigDict) -> tuple[Source, Source]:
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

    return split(data.num_examples), split(data.num_examples // 4)


def _tfds(data: ConfigDict) -> tuple[Source, Source]:
    raise UserError(
        f"config.data.name = 'tfds' ({data.tfds_name}) cannot be read by this version; export "
        "the images to folders and use --config.data.name=folder --config.data.dir=DIR"
    )


SOURCES: dict[str, Callable[[ConfigDict], tuple[Source, Source]]] = {
    "digits": _digits,
    "folder": _folder,
    "synthetic": _synthetic,
    "tfds": _tfds,
}


def open_splits(data: ConfigDict) -> tuple[Source, Source]:
    """Opens the training and the test split of ``config.data``.

    Raises:
      UserError: what is missing or damaged, by path.
    """
    if data.name not in SOURCES:
        raise unknown("config.data.name", data.name, SOURCES)
    train, test = SOURCES[data.name](data)
    channels = train.image_shape[-1]
    if data.mean and len(data.mean) != channels:
        raise UserError(
            f"config.data.mean has {len(data.mean)} values, but the images have {channels} channels"
        )
    return train, test


def channel_statistics(source: Source, *, at_most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, in units of 1.

    Args:
      source: the training split.
      at_most: a larger split that is not in memory is sampled at this many evenly spaced
        examples.

    Returns:
      Two float64 arrays ``(C,)``.
    """
    if isinstance(source, ArraySource):
        chunks = np.array_split(source.images, max(1, len(source) // 1000))
    else:
        chosen = np.linspace(0, len(source) - 1, min(at_most, len(source))).astype(int)
        chunks = [source[index][0][None] for index in chosen]
    count, total, squares = 0, 0.0, 0.0
    for chunk in chunks:
        pixels = chunk.reshape(-1, chunk.shape[-1]) / 255.0
        count += len(pixels)
        total = total + pixels.sum(0)
        squares = squares + np.square(pixels).sum(0)
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0.0))
    return mean, np.where(std > 0, std, 1.0)
