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
_MOST_CLASSES = 1000


def draw_contact_sheet(source: EncodedSource, path: pathlib.Path) -> None:
    """Draws evenly spaced images of each class that has some, of at most 1,000, below its name.

    Args:
      source: a split, with images of ``CELL`` pixels.
      path: where the picture goes.

    Raises:
      UserError: an image is damaged.
      OSError: the system refuses.
    """
    order = np.argsort(source.labels, kind="stable")
    classes, starts, counts = np.unique(source.labels[order], return_index=True, return_counts=True)
    shown = min(len(classes), _MOST_CLASSES)
    across, down = _IMAGES * CELL + _MARGIN, CELL + _TEXT + _MARGIN
    columns = min(_WIDTH, shown)
    rows = -(-shown // columns)
    picture = Image.new("RGB", (columns * across + _MARGIN, rows * down + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for place in progress_bar(range(shown), "drawing", shown, unit="class"):
        row, column = divmod(place, columns)
        left, top = _MARGIN + column * across, _MARGIN + row * down
        number, count = int(classes[place]), int(counts[place])
        name = short(source.class_names[number], 36)
        draw.text((left, top), f"{number} {name} ({count})", fill="black")
        chosen = starts[place] + np.linspace(0, count - 1, min(_IMAGES, count)).astype(int)
        for cell, index in enumerate(order[chosen].tolist()):
            image = source[index][0]
            drawn = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            picture.paste(drawn.convert("RGB"), (left + cell * CELL, top + _TEXT))
    picture.save(path)
