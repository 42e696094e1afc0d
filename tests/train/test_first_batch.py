"""What a run is about to learn from: a picture, and a line."""

import jax
import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data.sources import ArraySource
from mimicnorm_jax.train import first_batch
from mimicnorm_jax.train.first_batch import draw_first_batch
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.messages import classes
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.step import augmented
from tests.train.test_init_from import folder_of

CELL, MARGIN, TEXT = first_batch._CELL, first_batch._MARGIN, first_batch._TEXT


def cells_of(path, size):
    """The images in a picture, brought back to their size."""
    picture = Image.open(path).convert("RGB")
    found = []
    for top in range(MARGIN, picture.height - CELL, CELL + TEXT + MARGIN):
        for left in range(MARGIN, picture.width - CELL, CELL + MARGIN):
            cell = picture.crop((left, top, left + CELL, top + CELL))
            found.append(np.asarray(cell.resize((size, size), Image.Resampling.NEAREST)))
    return found


def test_the_picture_has_the_images_of_the_first_step_as_it_augments_them(tiny_config, tmp_path):
    options = {"data__flip": True, "data__pad_crop": 2, "batch_size": 20}
    experiment = set_up(tiny_config(**folder_of(tmp_path / "images", "ab"), **options))
    draw_first_batch(experiment, tmp_path / "first.png")
    batch = experiment.train_data.batch(0)
    seen, _ = augmented(experiment.config, 0, batch["image"], np.arange(20))
    changed = np.any(np.asarray(seen) != batch["image"], axis=(1, 2, 3))
    assert changed.sum() > 10
    cells = cells_of(tmp_path / "first.png", 8)
    assert len(cells) == 27  # three rows of nine places
    for cell, image in zip(cells, np.asarray(seen), strict=False):
        np.testing.assert_array_equal(cell, image)
    assert all(np.all(cell == 255) for cell in cells[20:])


def test_a_run_draws_it_once(tiny_config, tmp_path):
    train(tiny_config(network="mlp", max_steps=2), tmp_path / "run")
    path = tmp_path / "run" / "first_batch.png"
    cells = cells_of(path, 8)
    experiment = set_up(tiny_config(network="mlp", max_steps=2))
    images = jax.numpy.asarray(experiment.train_data.batch(0, at_most=3)["image"])
    seen, _ = augmented(experiment.config, 0, images, np.arange(3))
    np.testing.assert_array_equal(cells[2][..., :1], np.asarray(seen[2]))
    path.unlink()
    train(tiny_config(network="mlp", max_steps=4), tmp_path / "run")
    assert not path.exists()


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((2, 3), "their training images: cat 2, dog 3"),
        ((2, 40), "cat 2, dog 40\nNOTE: dog has 20 times as many images as cat"),
        ((0, 40), "NOTE: dog has 40 times"),
    ],
)
def test_classes_are_listed_in_the_order_of_the_logits(counts, said):
    labels = np.repeat(np.arange(2), counts)
    source = ArraySource(np.zeros((len(labels), 2, 2, 1), np.uint8), labels, ["cat", "dog"])
    assert said in classes(source)


def test_many_classes_are_not_all_listed():
    names = [f"c{number:03}" for number in range(100)]
    labels = np.repeat(np.arange(100), 3)
    source = ArraySource(np.zeros((300, 1, 1, 1), np.uint8), labels, names)
    assert classes(source).endswith("c000 3, c001 3, …, c099 3 (100 classes, c000 3 images)")
