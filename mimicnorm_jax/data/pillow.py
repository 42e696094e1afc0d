"""Images of every kind by Pillow: which kinds it may open, and how much memory they may take."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

MAX_BYTES = 2**30  # of one image, with what it is converted by
_HELD_AT_MOST = 2 * MAX_BYTES  # by all threads
_SMALL = 2**24  # bytes of an image that is not counted

# Others would be looked for in any file, whatever it is called; some of them start programs.
_KINDS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM")
for _plugin in ("Avif", "Bmp", "Gif", "Jpeg", "Png", "Ppm", "Tiff", "WebP"):
    with contextlib.suppress(ImportError):  # before Pillow 11.3 there is none for AVIF
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
KINDS = tuple(kind for kind in _KINDS if kind in Image.OPEN)

_ONE_BYTE = ("1", "L", "P")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
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


class _Memory:
    """What all threads hold together: who wants more than is left waits."""

    def __init__(self, at_most: int):
        self._left = at_most
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


_memory = _Memory(_HELD_AT_MOST)


def bytes_of(height: int, width: int, bytes_a_pixel: int) -> int:
    """What a decoded image takes.

    Raises:
      ValueError: that is more than ``MAX_BYTES``.
    """
    needed = height * width * bytes_a_pixel
    if needed > MAX_BYTES:
        raise ValueError(
            f"its header claims {width} x {height} pixels, which take {needed / 2**30:.1f} GiB to "
            f"decode, more than {MAX_BYTES / 2**30:.0f}"
        )
    return needed


def room_for(
    height: int, width: int, bytes_a_pixel: int
) -> contextlib.AbstractContextManager[None]:
    """Holds the memory of a decoded image, for which it waits while other threads have it.

    Images below 16 MiB are not counted, which would take a hundredth of the time of a crop: each
    thread may have one beside.

    Raises:
      ValueError: as ``bytes_of``.
    """
    needed = bytes_of(height, width, bytes_a_pixel)
    return _FREE if needed < _SMALL else _memory.held(needed)


_FREE = contextlib.nullcontext()


def is_turned(data: bytes) -> bool:
    """Whether the EXIF data of an image say that it is to be turned."""
    with Image.open(io.BytesIO(data), formats=KINDS) as image:
        return _turn(image) is not None


def decode(
    data: bytes, *, upright: bool, background: Colour = WHITE, at_least: int | None = None
) -> np.ndarray:
    """The whole image, uint8 ``(H, W, 3)``; arguments as those of ``images.decode``.

    Raises:
      Exception: damaged, no image of ``KINDS``, or of more than ``MAX_BYTES``; mostly ``OSError``
        or ``ValueError``, but decoders raise what they like.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=KINDS)
    except UnidentifiedImageError as error:  # whose message is the address of the bytes
        raise ValueError(what_it_is(data)) from error
    with opened as file:
        if at_least is not None:
            width, height = (at_least * side // min(file.size) for side in file.size)
            file.draft(file.mode, (width, height))
        is_transparent = file.mode in _TRANSPARENT or "transparency" in file.info
        # as it is, as it is put on a background, and the array, which Pillow makes of a copy
        stored = 1 if file.mode in _ONE_BYTE else 4
        converted = 8 if is_transparent else 0 if file.mode == "RGB" else 4
        with room_for(file.height, file.width, stored + converted + 2 * 3):
            return _as_rgb(file, _turn(file) if upright else None, is_transparent, background)


def _as_rgb(
    file: Image.Image, turn: Image.Transpose | None, is_transparent: bool, background: Colour
) -> np.ndarray:
    image = file if turn is None else file.transpose(turn)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        levels = np.asarray(image).clip(0, 65535)
        if 255 < levels.max() < 2**12:
            _say_that_it_is_dark()
        image = Image.fromarray((levels // 257).astype(np.uint8))
    if is_transparent:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


_dark_is_said = threading.Lock()  # which is never given back


def _say_that_it_is_dark() -> None:
    """Once a process: cameras and scanners store 12 bits in 16."""
    if _dark_is_said.acquire(blocking=False):
        print(
            "NOTE: a 16-bit grey image has no value above 4095; if its values have 12 bits, the "
            "network sees it 16 times too dark: store such images with 16 times the values",
            file=sys.stderr,
        )


def is_image(data: bytes) -> bool:
    """Whether these are the bytes of a file of ``KINDS``, by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=KINDS):
            return True
    except Exception:  # whatever a damaged header makes of it
        return False


def what_it_is(data: bytes) -> str:
    """Of a file that is none of ``KINDS``, for people."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"mif1", b"hevc"):
        return "it is HEIC, which is not read: make it a JPEG"
    if brand in (b"avif", b"avis"):
        return "it is AVIF, which needs Pillow 11.3 or newer"
    return "it is no image of a kind that is read"


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright; None if it is, or if its EXIF data are damaged."""
    try:
        return _TURNED.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever damaged EXIF data make their reader raise
        return None
