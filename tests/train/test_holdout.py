"""Images held out choose the best checkpoint, in place of the test images."""

import json

import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.evaluated_run import evaluate_run
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.metrics import evaluations
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.trained import load


@pytest.fixture
def held_out(tiny_config):
    """The configuration of a run that holds a fifth of the digits out, evaluated thrice."""

    def make(**overrides):
        options = {"network": "mlp", "data__holdout": 0.2, "max_steps": 6}
        return tiny_config(
            **options | {"eval_every": 2 / 36, "checkpoint_every": 2 / 36} | overrides
        )

    return make


def test_a_run_says_what_it_held_out_and_what_it_got_there(held_out, tmp_path, capsys):
    summary = train(held_out(), tmp_path / "run")
    output = capsys.readouterr().out
    assert "1150 training and 360 test images, 287 held out" in output
    assert "holdout_accuracy" in output and "best by the images held out: test" in output
    rows = evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {(row["test_examples"], row["holdout_examples"]) for row in rows} == {(360, 287)}
    assert summary["best_chosen_by"] == "holdout"
    assert summary["final_holdout_accuracy"] == rows[-1]["holdout_accuracy"]
    best = rows[int(np.argmax([row["holdout_accuracy"] for row in rows]))]
    assert summary["best_step"] == best["step"]
    assert summary["best_test_accuracy"] == best["test_accuracy"]
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {name: part["examples"] for name, part in data.items()} == {
        "train": 1150,
        "test": 360,
        "holdout": 287,
    }


def test_the_best_checkpoint_is_the_one_that_they_choose(held_out, tmp_path, monkeypatch):
    found = iter([(0.9, 0.1), (0.3, 0.6), (0.5, 0.2), (0.5, 0.2)])  # the last: exact statistics

    def evaluate(*_):
        test, holdout = next(found)
        counts = {"test_examples": 360, "holdout_examples": 287, "test_loss": 1.0}
        return counts | {"test_accuracy": test, "holdout_accuracy": holdout, "holdout_loss": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    summary = train(held_out(keep_checkpoints=1), tmp_path / "run")
    assert (summary["best_step"], summary["best_test_accuracy"]) == (4, 0.3)
    results = evaluate_run(held_out(), tmp_path / "run").results
    assert (results["best"]["step"], results["latest"]["step"]) == (4, 6)
    assert load(tmp_path / "run", which="best").step == 4


def test_nothing_that_was_held_out_is_trained_on(held_out):
    experiment = set_up(held_out())
    kept, out = (
        {image.tobytes() for image in data.source.images}
        for data in (experiment.train_data, experiment.holdout_data)
    )
    assert len(out) > 250 and not kept & out
    assert experiment.images.num_examples == 1150


def test_a_run_does_not_go_on_with_others_held_out(held_out, tmp_path):
    train(held_out(), tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.data\.holdout \(0\.2 there, 0\.3 now\)"):
        train(held_out(data__holdout=0.3, max_steps=8), tmp_path / "run")


def test_without_any_the_test_images_choose_as_in_the_paper(held_out, tmp_path):
    summary = train(held_out(data__holdout=0.0), tmp_path / "run")
    assert summary["best_chosen_by"] == "test" and summary["final_holdout_accuracy"] is None
