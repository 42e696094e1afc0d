"""Some images of each class as one picture, in which wrong labels and damage are seen."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image, ImageDraw

from mimicnorm_jax.data.classes import short
from mimicnorm_jax.data.sources import EncodedSource
from mimicnorm_jax.progress_bar import progress_bar

CELL = 64  # pixels of an image
_IMAGES = 5  # of each class
_MARGIN, _TEXT = 8, 14
_WIDTH = 4  # classes beside each other


def draw_contact_sheet(source: EncodedSource, path: pathlib.Path) -> None:
    """Draws evenly spaced images of each class, below its name and how many it has.

    Args:
      source: a split, with images of ``CELL`` pixels.
      path: where the picture goes.

    Raises:
      UserError: an image is damaged.
      OSError: the system refuses.
    """
    names = source.class_names
    across, down = _IMAGES * CELL + _MARGIN, CELL + _TEXT + _MARGIN
    columns = min(_WIDTH, len(names))
    rows = -(-len(names) // columns)
    picture = Image.new("RGB", (columns * across + _MARGIN, rows * down + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(progress_bar(names, "drawing", len(names), unit="class")):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * across, _MARGIN + row * down
        of_class = np.flatnonzero(source.labels == number)
        draw.text((left, top), f"{number} {short(name, 36)} ({len(of_class)})", fill="black")
        shown = np.linspace(0, len(of_class) - 1, min(_IMAGES, len(of_class))).astype(int)
        for place, index in enumerate(of_class[shown].tolist()):
            image = source[index][0]
            cell = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            picture.paste(cell.convert("RGB"), (left + place * CELL, top + _TEXT))
    picture.save(path)
