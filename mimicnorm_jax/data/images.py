"""From the bytes of an image file to uint8 RGB of one size: decode, crop, resize.

Nearly every photograph is an 8-bit JPEG in grey or YCbCr: libjpeg-turbo (simplejpeg)
decodes those, and of them no more than a crop needs. Pillow decodes everything else (PNG,
CMYK, 16 bits, palettes), and whatever libjpeg-turbo finds fault with.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# As Pillow's own limit: a header that claims more is a mistake or an attack.
MAX_PIXELS = 2 * 89_478_485

cv2.setNumThreads(0)  # the pipeline works on many images at a time already

_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_BLOCK_ROWS = 32  # the most that a row of blocks is high
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"its header claims {width} x {height} pixels, more than {MAX_PIXELS}")


def _with_pillow(data: bytes, *, upright: bool) -> np.ndarray:
    """Decodes anything that Pillow knows."""
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose message is the address of the bytes
        raise ValueError("it is no image") from error
    with opened as file:
        _check_size(*file.size)
        turn = _turn(file) if upright else None
        image: Image.Image = file if turn is None else file.transpose(turn)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if "transparency" in file.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def _is_plain(jpeg: _Jpeg | None, data: bytes, *, upright: bool) -> bool:
    if jpeg is None:
        return False
    _check_size(jpeg.height, jpeg.width)
    if upright and jpeg.has_exif:
        with Image.open(io.BytesIO(data)) as image:
            return _turn(image) is None
    return True


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright; None if it is, or if its EXIF data are damaged."""
    try:
        return _TURNED.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever damaged EXIF data make their reader raise
        return None


def decode(data: bytes, *, upright: bool) -> np.ndarray:
    """The whole image, uint8 ``(H, W, 3)``.

    Args:
      data: content of the file.
      upright: turn it as its EXIF orientation says.

    Raises:
      Exception: damaged, no image, or beyond ``MAX_PIXELS``; mostly ``OSError`` or
        ``ValueError``, but decoders raise what they like.
    """
    if _is_plain(_parse_jpeg(data), data, upright=upright):
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # a warning is enough for that: many a good file has a superfluous byte
    return _with_pillow(data, upright=upright)


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


def decode_crop(data: bytes, choose: CropChoice, size: int, *, upright: bool) -> np.ndarray:
    """A crop of an image, resized to uint8 ``(size, size, 3)``.

    Args:
      data: content of the file.
      choose: where the crop is, once height and width are known.
      size: in pixels.
      upright: turn the image as its EXIF orientation says, before it is cropped.

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
        image = _with_pillow(data, upright=False)
    else:
        image = _with_pillow(data, upright=upright)
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
    scale = 1
    while scale < 8 and min(crop.height, crop.width) >= 2 * scale * size:
        scale *= 2
    # Rows beyond the crop, which the upsampling of the colours looks at, and whole blocks.
    needed = crop.top + crop.height + 2 * scale
    height = min((needed // _BLOCK_ROWS + 1) * _BLOCK_ROWS, jpeg.height)
    if height < jpeg.height:
        at = jpeg.height_at
        data = data[:at] + height.to_bytes(2) + data[at + 2 :]
    options = {}
    if scale > 1:
        options = {
            "min_height": math.ceil(height / scale),
            "min_width": math.ceil(jpeg.width / scale),
            "min_factor": scale,
        }
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
