import json
import math
import re

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.loop import NonFiniteError, evaluate_run, train
from mimicnorm_jax.train.metrics import read_rows
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import digest


@pytest.fixture
def finished(tiny_config, tmp_path, capsys):
    config = tiny_config(epochs=2.0, log_every=5)
    summary = train(config, tmp_path / "run")
    return config, tmp_path / "run", summary, capsys.readouterr().out


def test_a_run_leaves_what_is_promised(finished):
    config, workdir, summary, output = finished
    assert summary == json.loads((workdir / "summary.json").read_text())
    promised = (
        "config method network num_parameters steps resumed_from_step seconds images_per_second "
        "final_test_accuracy best_test_accuracy final_train_loss test_examples state_sha256 "
        "jax_version device_kind num_devices finished"
    )
    assert set(promised.split()) <= summary.keys()
    assert summary["steps"] == math.ceil(2 * 1437 / 32) == 90
    assert summary["config"]["data.image_size"] == 8
    assert summary["final_test_accuracy"] > 0.5
    assert summary["best_test_accuracy"] >= summary["final_test_accuracy"]
    assert re.fullmatch("[0-9a-f]{64}", summary["state_sha256"])
    # the person saw the network, the configuration, the metrics and the end
    for text in (
        "branch/0/conv/kernel",
        "config.batch_size = 32",
        "images/s",
        "test_accuracy",
        "curves:",
    ):
        assert text in output
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))

    rows = read_rows(workdir)
    training = [row for row in rows if "train_loss" in row]
    evaluations = [row for row in rows if "test_accuracy" in row]
    assert [row["step"] for row in training] == [*range(5, 91, 5)]
    assert [row["step"] for row in evaluations] == [45, 90]
    assert training[0].keys() >= {"learning_rate", "images_per_second", "train_accuracy", "epoch"}
    assert evaluations[-1]["test_accuracy"] == summary["final_test_accuracy"]
    assert training[-1]["train_loss"] < training[0]["train_loss"]
    assert training[0]["learning_rate"] == pytest.approx(0.1 * 4 / 22, rel=0.01)  # of step 4

    # evaluating the folder again finds the same numbers
    results = evaluate_run(config, workdir)
    assert results["latest"]["step"] == 90
    assert results["latest"]["test_accuracy"] == summary["final_test_accuracy"]
    assert results["best"]["test_accuracy"] == summary["best_test_accuracy"]
    assert json.loads((workdir / "eval.json").read_text()) == results

    # the saved state is the digest's
    experiment = set_up(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    state, _ = checkpoints.restore_latest(experiment.abstract_state)
    checkpoints.close()
    assert digest(state) == summary["state_sha256"]
    assert digest(state.replace(step=state.step + 1)) != summary["state_sha256"]


def test_a_run_may_be_continued_with_more_steps(tiny_config, tmp_path):
    short = train(tiny_config(max_steps=7), tmp_path / "run")
    assert (short["steps"], short["resumed_from_step"]) == (7, 0)
    longer = train(tiny_config(max_steps=12), tmp_path / "run")
    assert (longer["steps"], longer["resumed_from_step"]) == (12, 7)
    whole = train(tiny_config(max_steps=12), tmp_path / "whole")
    assert longer["state_sha256"] == whole["state_sha256"]


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny_config, tmp_path):
    config = tiny_config(
        method="nonorm",
        learning_rate=1e4,
        checkpoint_every=2 / 45,
        schedule__warmup_epochs=4 / 45,
    )
    with pytest.raises(
        NonFiniteError, match=r"at step \d+ \(learning rate .*learning_rate.*clip_norm"
    ):
        train(config, tmp_path / "run")
    experiment = set_up(config)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    state, _ = checkpoints.restore_latest(experiment.abstract_state)
    checkpoints.close()
    assert int(state.step) >= 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.device_get(state.params)))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_damaged_checkpoint_is_skipped_loudly_for_the_one_before_it(
    tiny_config, tmp_path, capsys
):
    config = tiny_config(max_steps=6, checkpoint_every=2 / 45)
    expected = train(config, tmp_path / "whole")
    train(tiny_config(max_steps=4, checkpoint_every=2 / 45), tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / "4" / "state"
    for path in latest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    summary = train(config, tmp_path / "run")
    assert "checkpoint of step 4 is damaged" in capsys.readouterr().err
    assert (tmp_path / "run" / "damaged" / "4").is_dir()
    assert summary["resumed_from_step"] == 2
    assert summary["state_sha256"] == expected["state_sha256"]


def test_the_best_checkpoint_is_kept_beside_the_latest(tiny_config, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.9, 0.3, 0.4, 0.5])
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda *_: {"test_loss": 1.0, "test_accuracy": next(accuracies), "test_examples": 360},
    )
    every = 2 / 45
    config = tiny_config(max_steps=10, eval_every=every, checkpoint_every=every, keep_checkpoints=2)
    summary = train(config, tmp_path / "run")
    kept = sorted(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()
    )
    assert kept == [4, 8, 10]
    assert (summary["best_test_accuracy"], summary["best_step"]) == (0.9, 4)
    assert summary["final_test_accuracy"] == 0.5


def test_a_run_of_another_configuration_is_not_overwritten(tiny_config, tmp_path):
    train(tiny_config(max_steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.learning_rate \(0\.1 there, 0\.2 now\)"):
        train(tiny_config(max_steps=2, learning_rate=0.2), tmp_path / "run")
    # what does not change the computation may be changed
    assert train(tiny_config(max_steps=3, log_every=1), tmp_path / "run")["steps"] == 3
