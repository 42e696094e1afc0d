import dataclasses
import functools
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.errors import NonFiniteError, UserError
from mimicnorm_jax.layers import last_bn_loss_floor
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.evaluated_run import Question, evaluate_run
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.metrics import evaluations, read_rows
from mimicnorm_jax.train.setup import configure_jax, set_up
from mimicnorm_jax.train.state import digest
from mimicnorm_jax.train.stopping import Stopped
from tests.runs import TINY


@pytest.fixture
def tiny_config(tiny_config):
    """Of a network that compiles sooner: the loop does the same with each."""
    return functools.partial(tiny_config, network="mlp")


@pytest.fixture
def finished(tiny_config, tmp_path, capsys):
    config = tiny_config(network="resnet8", epochs=2.0, log_every=5, optimizer__label_smoothing=0.1)
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
        "img/s",
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

    # the least that the batches allow stands beside the loss
    assert "the last BN keeps the training loss above 0.65 on average" in output
    assert "(at least 0." in output
    batches = [set_up(config).train_data.batch(step)["label"] for step in range(5)]
    counts = [np.bincount(labels, minlength=10) for labels in batches]
    floors = [last_bn_loss_floor(count, label_smoothing=0.1) for count in counts]
    assert training[0]["train_loss_floor"] == pytest.approx(np.mean(floors), abs=1e-3)
    assert all(row["train_loss"] > row["train_loss_floor"] > 0.578 for row in training)
    assert summary["final_train_loss_floor"] == training[-1]["train_loss_floor"]

    # evaluating the folder again finds the same numbers
    results = evaluate_run(config, workdir, Question(exact=True)).results
    assert results["latest"]["step"] == 90
    assert results["latest"]["test_accuracy"] == summary["final_test_accuracy"]
    assert results["best"]["test_accuracy"] == summary["best_test_accuracy"]
    exact = results["latest_recalibrated"]["test_accuracy"]
    assert exact == summary["final_test_accuracy_recalibrated"] > 0.5
    assert f"with exact last-BN statistics: {exact:.4f}" in output
    assert json.loads((workdir / "eval.json").read_text()) == results

    # the saved state is the digest's
    state = last_state(config, workdir)
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
    state = last_state(config, tmp_path / "run")
    assert int(state.step) >= 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    assert not (tmp_path / "run" / "summary.json").exists()


def last_state(config, workdir):
    experiment = set_up(config)
    checkpoints = Checkpoints(workdir / "checkpoints")
    return checkpoints.restore_latest(experiment.abstract_state).state


def test_a_state_that_a_finite_loss_has_ruined_is_not_kept(tiny_config, tmp_path):
    """The loss of a step is that of the state before it: here only step 3 sees the harm."""
    every = 1 / 45
    config = tiny_config(max_steps=4, eval_every=every, checkpoint_every=every)
    experiment = set_up(config)
    original = experiment.train_step

    def train_step(state, batch):
        state, metrics = original(state, batch)
        if jax.device_get(state.step) == 2:
            with jax.transfer_guard("allow"):
                state = state.replace(params=jax.tree.map(lambda x: x * np.inf, state.params))
        return state, metrics

    ruined = dataclasses.replace(experiment, train_step=train_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up_together", lambda *_: ruined)
        with pytest.raises(NonFiniteError, match=r"at step 2 .*the checkpoint of step 1 is kept"):
            train(config, tmp_path / "run")
    assert int(last_state(config, tmp_path / "run").step) == 1
    evaluated = [row["step"] for row in read_rows(tmp_path / "run") if "test_loss" in row]
    assert evaluated == [1]


def test_an_infinite_gradient_stops_the_run(tiny_config, tmp_path, monkeypatch):
    experiment = set_up(tiny_config(max_steps=4))
    original = experiment.train_step

    def train_step(state, batch):
        state, metrics = original(state, batch)
        with jax.transfer_guard("allow"):
            return state, metrics | {"gradient_norm": metrics["gradient_norm"] * np.inf}

    infinite = dataclasses.replace(experiment, train_step=train_step)
    monkeypatch.setattr(loop, "set_up_together", lambda *_: infinite)
    with pytest.raises(
        NonFiniteError, match=r"the gradient norm is inf at step 1.*no step is kept"
    ):
        train(tiny_config(max_steps=4), tmp_path / "run")


def test_a_finished_run_is_left_alone(tiny_config, tmp_path, capsys):
    first = train(tiny_config(max_steps=4), tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for same in (tiny_config(max_steps=4, log_every=1), tiny_config(max_steps=4, epochs=1.0)):
        assert train(same, tmp_path / "run") == first
        assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="of 4 steps already, more than the 3"):
        train(tiny_config(max_steps=3), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files


def test_a_run_is_not_continued_on_other_images(tiny_config, tmp_path, capsys):
    def config(name, steps):
        return tiny_config(
            max_steps=steps,
            epochs=9.0,
            batch_size=4,
            data__name="folder",
            data__dir=str(tmp_path / name),
        )

    for name, shade in (("a", 0), ("b", 90)):
        for split in ("train", "test"):
            for label in ("x", "y"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for index in range(4):
                    pixels = np.full((8, 8, 3), shade + index, np.uint8)
                    pixels[index:, : 2 if label == "x" else 6] = 200
                    Image.fromarray(pixels).save(folder / f"{name if shade else ''}{index}.png")
    train(config("a", 2), tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert train(config("moved", 3), tmp_path / "run")["resumed_from_step"] == 2
    for steps in (3, 4):  # a run that is finished is one of its images, too
        with pytest.raises(UserError, match="a run on other train images"):
            train(config("b", steps), tmp_path / "run")
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    capsys.readouterr()
    train(config("copy", 3), tmp_path / "run")
    assert "is finished" in capsys.readouterr().out


def test_checkpoints_that_are_gone_are_no_new_beginning(tiny_config, tmp_path):
    train(tiny_config(max_steps=2), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="whose checkpoints are gone; put the folder"):
        train(tiny_config(max_steps=4), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files


def test_what_a_kill_in_the_first_moment_leaves_is_no_obstacle(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.tmp").write_text("{")
    assert train(tiny_config(max_steps=1), tmp_path / "run")["steps"] == 1
    # one step is nothing to time: JSON's null, not a made-up number
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images_per_second"] is None


def test_a_damaged_checkpoint_is_skipped_loudly_for_the_one_before_it(
    tiny_config, tmp_path, capsys
):
    config = tiny_config(max_steps=6, checkpoint_every=2 / 45)
    expected = train(config, tmp_path / "whole")
    train(tiny_config(max_steps=4, checkpoint_every=2 / 45), tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "4")
    capsys.readouterr()
    summary = train(config, tmp_path / "run")
    assert "checkpoint of step 4 is damaged" in capsys.readouterr().err
    assert (tmp_path / "run" / "damaged" / "4").is_dir()
    assert summary["resumed_from_step"] == 2
    assert summary["state_sha256"] == expected["state_sha256"]


def damage(checkpoint):
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_where_no_checkpoint_can_be_read_nothing_is_touched(tiny_config, tmp_path, capsys):
    config = tiny_config(max_steps=4, checkpoint_every=2 / 45)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "4")
    results = evaluate_run(config, tmp_path / "run").results
    assert results["best"]["step"] == 2
    assert "checkpoint of step 4 is damaged" in capsys.readouterr().err
    damage(folder / "2")
    for attempt in (
        lambda: train(tiny_config(max_steps=6, checkpoint_every=2 / 45), tmp_path / "run"),
        lambda: evaluate_run(config, tmp_path / "run"),
    ):
        with pytest.raises(UserError, match="none of the checkpoints in"):
            attempt()


def test_the_best_checkpoint_is_kept_beside_the_latest(tiny_config, tmp_path, monkeypatch):
    at_end = 0.1  # each call of train ends with another one, with exact statistics
    accuracies = iter([0.2, 0.9, 0.3, at_end, 0.4, 0.5, at_end])
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda *_: {"test_loss": 1.0, "test_accuracy": next(accuracies), "test_examples": 360},
    )
    every = 2 / 45
    config, start = (
        tiny_config(max_steps=n, eval_every=every, checkpoint_every=every, keep_checkpoints=2)
        for n in (10, 6)
    )
    train(start, tmp_path / "run")
    summary = train(config, tmp_path / "run")  # the one that resumes knows the best one too
    kept = sorted(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()
    )
    assert kept == [4, 8, 10]
    assert (summary["best_test_accuracy"], summary["best_step"]) == (0.9, 4)
    assert summary["final_test_accuracy"] == 0.5
    experiment = set_up(config)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    accuracies = {row["step"]: row["test_accuracy"] for row in evaluations(tmp_path / "run")}
    assert int(checkpoints.restore_best(experiment.abstract_state, accuracies).state.step) == 4


def test_a_run_of_another_configuration_is_not_overwritten(tiny_config, tmp_path):
    train(tiny_config(max_steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.learning_rate \(0\.1 there, 0\.2 now\)"):
        train(tiny_config(max_steps=2, learning_rate=0.2), tmp_path / "run")
    # what does not change the computation may be changed
    assert train(tiny_config(max_steps=3, log_every=1), tmp_path / "run")["steps"] == 3


def test_another_seed_is_another_run(tiny_config, tmp_path):
    first, second = (
        train(tiny_config(seed=seed, max_steps=2), tmp_path / str(seed)) for seed in (0, 1)
    )
    assert first["state_sha256"] != second["state_sha256"]


def test_an_evaluation_that_a_stop_interrupted_counts_once_it_is_made_up_for(
    tiny_config, tmp_path, monkeypatch
):
    """Its checkpoint was saved before it, and is the best one nevertheless."""
    outcomes = iter([None, 0.7, 0.1, 0.5, 0.1])  # 0.1: with exact statistics, at an end

    def evaluate(*_):
        if (accuracy := next(outcomes)) is None:
            raise Stopped("a test")
        return {"test_loss": 1.0, "test_accuracy": accuracy, "test_examples": 360}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert train(tiny_config(max_steps=4), tmp_path / "run") is None
    made_up = train(tiny_config(max_steps=4), tmp_path / "run")
    assert (made_up["resumed_from_step"], made_up["best_step"]) == (4, 4)
    longer = train(tiny_config(max_steps=6, keep_checkpoints=1), tmp_path / "run")
    assert (longer["best_step"], longer["best_test_accuracy"]) == (4, 0.7)
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [4, 6]
    monkeypatch.undo()
    assert evaluate_run(tiny_config(max_steps=6), tmp_path / "run").results["best"]["step"] == 4


@pytest.mark.parametrize("place", ["cache", pytest.param("file", marks=pytest.mark.long)])
def test_programs_are_compiled_once_for_all_runs(place, run_main, tmp_path):
    """By default under ~/.cache; a machine without a place for it compiles every time."""
    (tmp_path / "file").write_text("")
    done = run_main(
        *(*TINY, "--config.max_steps=1", f"--workdir={tmp_path / 'run'}"),
        XDG_CACHE_HOME=tmp_path / place,
        JAX_COMPILATION_CACHE_DIR="",
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kept = list((tmp_path / "cache").glob("mimicnorm_jax/jit_local_step-*"))
    assert bool(kept) == (place == "cache")


@pytest.mark.parametrize("chosen", [None, "0.5"])
def test_a_folder_of_the_environment_keeps_as_much(chosen, tiny_config, monkeypatch):
    """Unless the environment also says how long a program must take to be kept."""
    name = "jax_persistent_cache_min_compile_time_secs"
    folder, seconds = jax.config.jax_compilation_cache_dir, getattr(jax.config, name)
    assert folder  # of these tests
    monkeypatch.delenv(name.upper())
    if chosen:
        monkeypatch.setenv(name.upper(), chosen)
    jax.config.update(name, 1.0)
    try:
        configure_jax(tiny_config())
        assert getattr(jax.config, name) == (1.0 if chosen else 0.1)
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.config.update(name, seconds)
