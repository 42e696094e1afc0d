"""``config.steps_per_call``: several steps in one call of the devices, forced on CPUs here."""

import dataclasses

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import NonFiniteError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.tools import verify as verify_tool
from mimicnorm_jax.tools.verify import verify
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.metrics import read_rows
from mimicnorm_jax.train.setup import set_up
from tests.runs import saved_steps

OPTIONS = {
    "max_steps": 13,
    "log_every": 5,
    "eval_every": 6 / 45,
    "checkpoint_every": 7 / 45,
    "keep_checkpoints": 0,
    "network": "mlp",  # compiled in no time
    "network_options__depth": 3,
}


@pytest.fixture
def calls(monkeypatch):
    """Makes runs do four steps a call; the number of steps of each call."""
    counts = []

    def forced(config, workdir=None):
        experiment = dataclasses.replace(set_up(config, workdir), steps_per_call=4)
        original = experiment.several_steps

        def several_steps(state, batches, count):
            assert len(batches) == 4
            counts.append(int(jax.device_get(count)))
            return original(state, batches, count)

        return dataclasses.replace(experiment, several_steps=several_steps)

    monkeypatch.setattr(loop, "set_up_together", forced)
    monkeypatch.setattr(verify_tool, "set_up", forced)
    return counts


def test_a_run_is_the_same_with_several_steps_a_call(tiny_config, tmp_path, float64, request):
    config = tiny_config(**OPTIONS, precision="float64")
    single = train(config, tmp_path / "single")
    counts = request.getfixturevalue("calls")
    several = train(config, tmp_path / "several")
    # a call ends where something is logged (5, 10), evaluated (6, 12) or kept (7, and the end)
    assert counts == [4, 1, 1, 1, 3, 2, 1]
    assert saved_steps(tmp_path / "several") == saved_steps(tmp_path / "single")
    rows, expected = (read_rows(tmp_path / name) for name in ("several", "single"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"images_per_second", "input_wait_fraction"}:
            rel = 1e-6 if name == "learning_rate" else 1e-9  # optax computes it in float32
            assert row[name] == pytest.approx(other[name], rel=rel), (name, row["step"])
    assert several["final_test_loss"] == pytest.approx(single["final_test_loss"], rel=1e-9)


def test_a_resumed_run_has_the_same_bits(tiny_config, tmp_path, calls):
    whole = train(tiny_config(**OPTIONS), tmp_path / "whole")
    train(tiny_config(**OPTIONS | {"max_steps": 3}), tmp_path / "parts")
    calls.clear()
    resumed = train(tiny_config(**OPTIONS), tmp_path / "parts")
    assert calls == [2, 1, 1, 3, 2, 1]
    assert resumed["resumed_from_step"] == 3
    assert resumed["state_sha256"] == whole["state_sha256"]


def test_a_replay_makes_the_same_calls(tiny_config, tmp_path, calls):
    train(tiny_config(**OPTIONS), tmp_path / "run")
    calls.clear()
    verify(tmp_path / "run", count=0)
    assert calls and max(calls) == 4


def test_a_step_that_is_not_finite_is_named(tiny_config, tmp_path, calls):
    config = tiny_config(**OPTIONS, learning_rate=1e30, schedule__warmup_epochs=0.0)
    with pytest.raises(NonFiniteError, match=r"at step [23] "):
        train(config, tmp_path / "run")


def test_a_cpu_does_one_step_a_call(tiny_config):
    assert set_up(tiny_config(steps_per_call=8)).steps_per_call == 1


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_nothing_moves_to_the_devices_unasked(steps_per_call, tiny_config):
    config = tiny_config(network="mlp")
    experiment = dataclasses.replace(set_up(config), steps_per_call=steps_per_call)
    state, batch = experiment.initial_state(), experiment.train_data.batch(0)
    placed = shard_batch(batch, experiment.mesh)
    state, metrics = experiment.train(state, [placed] * steps_per_call)
    assert np.all(np.isfinite(jax.device_get(metrics["loss"])))
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        experiment.train(state, [batch] * steps_per_call)
