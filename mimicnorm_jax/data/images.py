"""From the bytes of an image file to uint8 RGB of one size: decode, crop, resize.

Nearly every photograph is an 8-bit JPEG in grey or YCbCr: libjpeg-turbo (simplejpeg)
decodes those, and of them no more than a crop needs. Pillow decodes everything else (PNG,
WebP, CMYK, 16 bits, palettes), and whatever libjpeg-turbo finds fault with.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from mimicnorm_jax.data import pillow
from mimicnorm_jax.data.pillow import WHITE, Colour

cv2.setNumThreads(0)  # the pipeline works on many images at a time already

_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_BLOCK_ROWS = 32  # the most that a row of blocks is high


class Crop(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class CropChoice(Protocol):
    """Chooses a rectangle of an image."""

    def __call__(self, height: int, width: int) -> Crop:
        """A crop of an image of ``height`` x ``width`` pixels."""
        ...


class _Jpeg(NamedTuple):
    """What the header of a JPEG that libjpeg-turbo decodes to RGB says."""

    height: int
    width: int
    height_at: int  # offset of the two bytes of the height
    scan_at: int  # offset of the first scan
    has_exif: bool


def _parse_jpeg(data: bytes) -> _Jpeg | None:
    """Reads the markers up to the first scan; None where Pillow shall decide."""
    if data[:2] != _START_OF_IMAGE:
        return None
    at, frame, has_exif = 2, None, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == _START_OF_SCAN:
            return None if frame is None else _Jpeg(*frame, scan_at=at, has_exif=has_exif)
        if marker in _HUFFMAN_FRAMES:
            bits, components = data[at + 4], data[at + 9]
            height, width = (int.from_bytes(data[at + k : at + k + 2]) for k in (5, 7))
            if bits != 8 or components not in (1, 3) or not height or not width:
                return None
            frame = (height, width, at + 5)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless or arithmetic
        elif marker == 0xE1:
            has_exif |= data[at + 4 : at + 8] == b"Exif"
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _is_plain(jpeg: _Jpeg, data: bytes, *, upright: bool) -> bool:
    pillow.bytes_of(jpeg.height, jpeg.width, 3)  # also where less of it is to be decoded
    return not (upright and jpeg.has_exif and pillow.is_turned(data))


def decode(
    data: bytes, *, upright: bool, background: Colour = WHITE, at_least: int | None = None
) -> np.ndarray:
    """The whole image, uint8 ``(H, W, 3)``.

    Args:
      data: content of the file.
      upright: turn it as its EXIF orientation says.
      background: what a transparent image is put on.
      at_least: a JPEG is decoded at a half, quarter or eighth where its short side still has as
        many pixels; None: as it is.

    Raises:
      Exception: damaged, of no kind that is read, or too large; mostly ``OSError`` or
        ``ValueError``, but decoders raise what they like.
    """
    jpeg = _parse_jpeg(data)
    if jpeg is not None and _is_plain(jpeg, data, upright=upright):
        scale = _scale(min(jpeg.height, jpeg.width), at_least)
        sides, options = _scaled(jpeg.height, jpeg.width, scale)
        with pillow.room_for(*sides, 3), contextlib.suppress(ValueError):
            # a warning is enough for that: many a good file has a superfluous byte
            return simplejpeg.decode_jpeg(data, "RGB", **options)
    return pillow.decode(data, upright=upright, background=background, at_least=at_least)


def _scale(short: int, at_least: int | None) -> int:
    """Of a short side, 1, 2, 4 or 8, so that as many pixels are left."""
    scale = 1
    while at_least and scale < 8 and short >= 2 * scale * at_least:
        scale *= 2
    return scale


def _scaled(height: int, width: int, scale: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The sides of a JPEG that is decoded at a part of its size, and how simplejpeg is told."""
    sides = math.ceil(height / scale), math.ceil(width / scale)
    options = {"min_height": sides[0], "min_width": sides[1], "min_factor": scale}
    return sides, options if scale > 1 else {}


def check_whole(data: bytes) -> None:
    """Finds what is no image, or was cut off, without decoding it.

    Raises:
      ValueError: says what is wrong.
    """
    if not pillow.is_image(data):
        raise ValueError(pillow.what_it_is(data))
    if data.startswith(_START_OF_IMAGE) and data.rfind(_END_OF_IMAGE) < 0:
        raise ValueError("it was cut off: its end is missing")
    if data.startswith(b"\x89PNG") and data.rfind(b"IEND") < 0:
        raise ValueError("it was cut off: its end is missing")


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """An image of 1 channel (by its luminance) or 3.

    Args:
      image: uint8 ``(H, W)``, grey, or ``(H, W, 3)``.
      channels: 1 or 3.

    Returns:
      uint8 ``(H, W, channels)``.
    """
    if image.shape[2:] == (channels,):
        return image
    made = np.asarray(Image.fromarray(image).convert("L" if channels == 1 else "RGB"))
    return made.reshape(*image.shape[:2], channels)


def decode_crop(
    data: bytes, choose: CropChoice, size: int, *, upright: bool, background: Colour = WHITE
) -> np.ndarray:
    """A crop of an image, resized to uint8 ``(size, size, 3)``.

    Args:
      data: content of the file.
      choose: where the crop is, once height and width are known.
      size: in pixels.
      upright: turn the image as its EXIF orientation says, before it is cropped.
      background: what a transparent image is put on.

    Raises:
      As for ``decode``; but damage in the middle of a JPEG, which leaves wrong pixels, goes
      unnoticed more often.
    """
    jpeg = _parse_jpeg(data)
    if jpeg is not None and _is_plain(jpeg, data, upright=upright):
        crop = choose(jpeg.height, jpeg.width)
        part = _decode_part(data, jpeg, crop, size)
        if part is not None:
            return _resize(part, size)
        image = pillow.decode(data, upright=False)
    else:
        image = pillow.decode(data, upright=upright, background=background)
        crop = choose(*image.shape[:2])
    return _resize(_cut(image, crop), size)


def _cut(image: np.ndarray, crop: Crop) -> np.ndarray:
    return image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    # Bilinear as in tf.image; where that would skip pixels, the mean of all of them.
    skips = min(image.shape[:2]) >= 2 * size
    interpolation = cv2.INTER_AREA if skips else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=interpolation)


def _decode_part(data: bytes, jpeg: _Jpeg, crop: Crop, size: int) -> np.ndarray | None:
    """Decodes a crop, at a half, quarter or eighth where that is still ``size`` or more.

    The rows below the crop, most of whose time goes into undoing the Huffman code, are
    never read: the copy that is decoded claims to end below the crop.

    Returns:
      The crop, or None where libjpeg-turbo finds fault with the file.
    """
    if data.rfind(_END_OF_IMAGE) < jpeg.scan_at:
        return None  # truncated, which Pillow will say
    scale = _scale(min(crop.height, crop.width), size)
    # Rows beyond the crop, which the upsampling of the colours looks at, and whole blocks.
    needed = crop.top + crop.height + 2 * scale
    height = min((needed // _BLOCK_ROWS + 1) * _BLOCK_ROWS, jpeg.height)
    if height < jpeg.height:
        at = jpeg.height_at
        data = data[:at] + height.to_bytes(2) + data[at + 2 :]
    sides, options = _scaled(height, jpeg.width, scale)
    with pillow.room_for(*sides, 3):
        try:
            # With the fast inverse cosine transform, as TensorFlow does by default: a level of
            # noise on average, where evaluation is exact.
            image = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=True, strict=height == jpeg.height, **options
            )
        except ValueError:
            return None
    return _cut(image, Crop(*(max(1, round(x / scale)) if x else 0 for x in crop)))


def centre_box(
    height: int, width: int, size: int, resize: int
) -> tuple[float, float, float, float]:
    """What remains of an image after ``Resize(resize)`` and ``CenterCrop(size)`` of torchvision.

    The short side becomes ``resize`` pixels, and ``size`` x ``size`` of them are kept.

    Returns:
      ``(left, top, right, bottom)`` in pixels of the image before resizing.
    """
    short = min(height, width)
    resized = [int(resize * side / short) for side in (height, width)]
    top, left = (round((side - size) / 2) for side in resized)
    down, across = height / resized[0], width / resized[1]
    return left * across, top * down, (left + size) * across, (top + size) * down


def centre_crop(image: np.ndarray, size: int, resize: int) -> np.ndarray:
    """Resizes the short side and crops at the centre, as torchvision does.

    Args:
      image: uint8 ``(H, W)`` or ``(H, W, C)``.
      size: height and width of the result.
      resize: the short side before the crop, at least ``size``.
    """
    if image.shape[:2] == (size, size) and resize == size:
        return image
    box = centre_box(image.shape[0], image.shape[1], size, resize)
    bilinear = Image.Resampling.BILINEAR  # of all pixels, however many fall into one
    return np.asarray(Image.fromarray(image).resize((size, size), bilinear, box))
