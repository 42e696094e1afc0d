import contextlib
import sys
import types

import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import host_copy


def test_the_progress_saved_is_that_of_its_step(tiny_config, tmp_path):
    """The loop appends the metrics of the next steps to the list that it saved."""
    experiment = set_up(tiny_config())
    state = host_copy(experiment.initial_state())
    for step in range(8):  # Orbax writes it in another thread: one try may be lucky
        with contextlib.closing(Checkpoints(tmp_path / str(step), keep=1)) as checkpoints:
            progress = {"since_log": [{"loss": 2.0}], "hardware": {}}
            checkpoints.save(state.replace(step=np.array(step, np.int32)), progress, best_step=0)
            progress["since_log"].append({"loss": 1.0})
            progress["since_log"][0]["loss"] = 0.0
        restored = checkpoints.restore_latest(experiment.abstract_state)
        assert restored.progress["since_log"] == [{"loss": 2.0}]


def test_writes_that_fail_after_a_failed_checkpoint_print_nothing(
    tiny_config, tmp_path, monkeypatch
):
    """TensorStore raises one error a write where nobody can catch it."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    state = host_copy(set_up(tiny_config()).initial_state())
    for name in ("a", "b"):
        with contextlib.closing(Checkpoints(tmp_path / name)) as checkpoints:
            checkpoints.save(state, {"since_log": [], "hardware": {}}, best_step=0)
    closed, other = (
        types.SimpleNamespace(exc_value=RuntimeError(message))
        for message in ("Event loop is closed", "something else")
    )
    sys.unraisablehook(closed)
    sys.unraisablehook(other)
    assert shown == [other]


def test_a_checkpoint_under_the_name_of_another_step_is_damage(tiny_config, tmp_path, capsys):
    experiment = set_up(tiny_config())
    state = host_copy(experiment.initial_state()).replace(step=np.array(3, np.int32))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with contextlib.closing(checkpoints):
        checkpoints.save(state, {"since_log": [], "hardware": {}}, best_step=0)
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "9")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"):
        checkpoints.restore_latest(experiment.abstract_state)
    assert "(it is that of step 3, in a folder of another name)" in capsys.readouterr().err
