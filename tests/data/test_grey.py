"""Grey images of 16 bits, some of which hold 12."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data import pillow


def encoded(levels):
    file = io.BytesIO()
    Image.fromarray(np.array(levels, np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _as_if_new(monkeypatch):
    monkeypatch.setattr(pillow, "_dark_is_said", threading.Lock())


def test_levels_are_scaled(capsys):
    image = pillow.decode(encoded([[0, 257, 65535]]), upright=False)
    assert image[0, :, 0].tolist() == [0, 1, 255] and image.shape == (1, 3, 3)
    assert not capsys.readouterr().err


def test_12_bits_are_said_once(capsys):
    data = encoded([[0, 2000, 4095]])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: pillow.decode(data, upright=False), range(50)))
    said = capsys.readouterr().err
    assert said.count("no value above 4095") == 1 and "16 times the values" in said


@pytest.mark.parametrize("levels", [[[0, 0]], [[0, 4096]], [[0, 255]]])
def test_nothing_is_said_of_others(capsys, levels):
    pillow.decode(encoded(levels), upright=False)
    assert not capsys.readouterr().err
