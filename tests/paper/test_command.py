"""``python -m mimicnorm_jax.paper``: what it writes, and what it says of wrong commands."""

import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.paper import depth, last_bn
from mimicnorm_jax.paper.__main__ import main
from mimicnorm_jax.paper.drawing import load


def test_a_figure_is_three_files(tmp_path, capsys):
    folder = tmp_path / "deep" / "figures"
    main(["figure4", "figure4", "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        *("figure4.json", "figure4.png", "figure4.svg")
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("figure4: weight mean moves")
    assert json.loads((folder / "figure4.json").read_text())["claim"] in said[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["figure6", "--out=x"], "unknown figure 'figure6' (did you mean 'figure9'?)"),
        (["figure4"], "required: --out"),
        (["figure4", "--out=x", "--data=/nowhere"], "--data=/nowhere is neither digits nor"),
        (["figure10", "--out=/proc/figures"], "--out=/proc/figures cannot be written to"),
    ],
)
def test_a_wrong_command_gets_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert expected in last
    assert not list(tmp_path.iterdir())


def _write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_mnist_files_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (17, 28, 28), np.uint8)
    labels = np.arange(17, dtype=np.uint8)
    _write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        load(str(tmp_path))
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    for array, message in (
        (labels[:-1], "do not belong together"),
        (pixels[:3], "do not belong together"),
        (pixels[:, :, :20], "has not 16 square images"),
        (np.zeros_like(pixels), "has not 16 square images"),
        (np.zeros_like(labels), "square images of two things"),
    ):
        name = "t10k-labels-idx1" if array.ndim == 1 else "t10k-images-idx3"
        kept = (tmp_path / f"{name}-ubyte.gz").read_bytes()
        _write_idx(tmp_path / f"{name}-ubyte.gz", array)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path))
        (tmp_path / f"{name}-ubyte.gz").write_bytes(kept)
    data = load(str(tmp_path))
    np.testing.assert_array_equal(data.pixels[..., 0], pixels)
    np.testing.assert_array_equal(data.labels, labels)
    images = data.some(100)
    assert images.shape == (17, 28, 28, 1)
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5


def test_class_folders_are_read_in_colour(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    data = load(str(tmp_path))
    assert data.pixels.shape == (16, 32, 32, 3) and data.labels.tolist() == [0] * 8 + [1] * 8
    images = data.some(16)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-5)
    assert [layer.shape for layer in depth._layers("straight", images, 3)] == [(16, 300)] * 2
    found = last_bn._variances("resnet8", "mimicnorm", data, width=0.25, batch=8, steps=2)
    assert np.shape(found) == (2, 2) and np.all(np.isfinite(found))
