"""What a network's first layers are for images of a given size."""

from __future__ import annotations

from mimicnorm_jax.errors import UserError, unknown

STEMS = ("auto", "small", "large")
LARGE_STEM_FROM = 96  # pixels; below it a stem of stride 4 leaves too little of the image


def resolve_stem(stem: str, image_size: int) -> str:
    """``"small"`` or ``"large"``, where ``"auto"`` goes by the image size in pixels.

    Raises:
      UserError: an unknown stem.
    """
    if stem not in STEMS:
        raise unknown("stem", stem, STEMS)
    if stem == "auto":
        return "large" if image_size >= LARGE_STEM_FROM else "small"
    return stem


def check_image_size(image_size: int, total_stride: int, stem: str) -> None:
    """Raises ``UserError`` if nothing would be left of the images."""
    if image_size < total_stride:
        raise UserError(
            f"image size {image_size} is too small for this network with a {stem} stem: "
            f"its total stride is {total_stride}"
        )
