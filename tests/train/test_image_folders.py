"""Runs on folders of images: which are the run's own, and which are others."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.evaluated_run import evaluate_run
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.setup import set_up
from tests.train.test_init_from import folder_of


@pytest.fixture(scope="module")
def begun(tiny_config, tmp_path_factory):
    """A run of three steps, whose images are not in memory, and the fields that choose these."""
    folder = tmp_path_factory.mktemp("begun")
    data = folder_of(folder / "images", "ab") | {"data__cache_gib": 0.0, "batch_size": 8}
    train(tiny_config(max_steps=3, **data), folder / "run")
    return folder / "run", data


def copy_of(begun, tmp_path):
    run, data = begun
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(data["data__dir"], tmp_path / "images")
    return tmp_path / "run", data | {"data__dir": str(tmp_path / "images")}


def test_a_copy_with_other_times_is_the_same_data(begun, tiny_config, tmp_path):
    run, data = copy_of(begun, tmp_path)
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path, (1, 1))
    assert train(tiny_config(max_steps=5, **data), run)["resumed_from_step"] == 3


def test_other_pixels_in_files_of_the_same_size_are_other_data(begun, tiny_config, tmp_path):
    run, data = copy_of(begun, tmp_path)
    path = tmp_path / "images" / "train" / "b" / "7.png"
    size = path.stat().st_size
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(UserError, match="on other train images"):
        train(tiny_config(max_steps=5, **data), run)


def test_a_run_of_an_earlier_version_goes_on_with_a_line(begun, tiny_config, tmp_path, capsys):
    run, data = copy_of(begun, tmp_path)
    known = json.loads((run / "data.json").read_text())
    for identity in known.values():
        assert identity["sha256"].startswith("2:")
        identity["sha256"] = 64 * "0"
    (run / "data.json").write_text(json.dumps(known))
    assert train(tiny_config(max_steps=5, **data), run)["resumed_from_step"] == 3
    assert "knows its train images by their names and sizes only" in capsys.readouterr().err
    known["train"]["examples"] += 1
    (run / "data.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="on other train images"):
        train(tiny_config(max_steps=6, **data), run)


def test_mean_and_std_are_measured_once(begun, tiny_config, monkeypatch):
    run, data = begun
    before = set_up(tiny_config(**data)).images
    monkeypatch.setattr("mimicnorm_jax.train.experiment.channel_statistics", None)
    assert set_up(tiny_config(**data), run).images == before
    with pytest.raises(TypeError):
        set_up(tiny_config(**data))


def test_a_folder_without_splits_from_training_to_evaluation(tiny_config, tmp_path, capsys):
    data = folder_of(tmp_path / "images", "ab")
    root = tmp_path / "images" / "train"
    root.rename(tmp_path / "classes")
    data |= {"data__dir": str(tmp_path / "classes"), "data__holdout": 0.2, "batch_size": 8}
    config = tiny_config(max_steps=2, **data)
    summary = train(config, tmp_path / "run")
    output = capsys.readouterr()
    assert "32 training and 0 test images, 8 held out" in " ".join(output.out.split())
    assert "its folders are taken as classes" in output.err
    assert summary["data"]["holdout"]["examples"] == 8 and "test" not in summary["data"]
    results = evaluate_run(config, tmp_path / "run").results
    assert "holdout_accuracy" in results["latest"]
    assert "NOTE: a batch of" not in output.out
    assert train(tiny_config(max_steps=3, **data), tmp_path / "run")["resumed_from_step"] == 2
    train(tiny_config(max_steps=1, **data | {"batch_size": 33}), tmp_path / "large")
    assert "NOTE: a batch of 33 takes all 32 training images" in capsys.readouterr().out
