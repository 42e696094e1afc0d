"""The first training images as a picture: what the network is about to learn from."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mimicnorm_jax.data.classes import short
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.json_files import without_link
from mimicnorm_jax.train.step import augmented

NAME = "first_batch.png"
_SHOWN, _COLUMNS = 36, 9
_CELL, _MARGIN, _TEXT = 112, 4, 14  # pixels


def draw_first_batch(experiment: Experiment, path: pathlib.Path) -> None:
    """Draws the first images of the first step, cropped and augmented as in it.

    Args:
      experiment: the run; in one of several processes the first.
      path: where the picture goes.

    Raises:
      UserError: an image is damaged.
      OSError: the system refuses.
    """
    batch = experiment.train_data.batch(0, at_most=_SHOWN)
    indices = jnp.arange(len(batch["label"]))
    augment = jax.jit(lambda images, indices: augmented(experiment.config, 0, images, indices)[0])
    images = np.asarray(augment(batch["image"], indices)).clip(0, 255).astype(np.uint8)
    names = experiment.train_data.source.class_names
    rows = -(-len(images) // _COLUMNS)
    across, down = _CELL + _MARGIN, _CELL + _TEXT + _MARGIN
    size = _COLUMNS * across + _MARGIN, rows * down + _MARGIN
    picture = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for number, (image, label) in enumerate(zip(images, batch["label"], strict=True)):
        row, column = divmod(number, _COLUMNS)
        left, top = _MARGIN + column * across, _MARGIN + row * down
        cell = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        # each pixel of a small image is to be seen
        way = Image.Resampling.NEAREST if cell.width < _CELL else Image.Resampling.BILINEAR
        picture.paste(cell.resize((_CELL, _CELL), way).convert("RGB"), (left, top))
        draw.text((left, top + _CELL), short(names[label]), fill=(0, 0, 0))
    picture.save(without_link(path))
