import json
import shutil

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools import verify as module
from mimicnorm_jax.tools.verify import VerificationError, intervals, main, verify
from mimicnorm_jax.train.checkpoint import Checkpoints, read
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.provenance import config_digest
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import saved_config


@pytest.fixture(scope="module")
def honest(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("verify") / "run"
    config = tiny_config(network="mlp", max_steps=10, checkpoint_every=3 / 45, keep_checkpoints=0)
    train(config, workdir)
    return workdir


@pytest.fixture
def run(honest, tmp_path):
    """A copy, to be forged."""
    shutil.copytree(honest, tmp_path / "run")
    return tmp_path / "run"


def test_an_honest_run_is_accepted_and_left_as_it_is(honest, capsys):
    before = {path: path.stat().st_mtime_ns for path in honest.rglob("*")}
    assert verify(honest, count=0) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    main([str(honest), "--intervals=2", "--seed=1"])
    output = capsys.readouterr().out
    assert "4 checkpoints; replaying 2 of 4 intervals" in output
    assert output.endswith("verified\n")
    assert {path: path.stat().st_mtime_ns for path in honest.rglob("*")} == before


def test_the_intervals_are_chosen_by_chance(honest, monkeypatch):
    replayed = []
    monkeypatch.setattr(
        module, "replay", lambda experiment, state, interval: replayed.append(interval) or "x"
    )
    for seed in range(12):
        with pytest.raises(VerificationError):
            verify(honest, count=1, seed=seed)
    assert set(replayed) == {(0, 3), (3, 6), (6, 9), (9, 10)}


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def forge(run, step, change):
    """Changes a checkpoint and saves it with a digest that fits, as if it were honest."""
    directory = run / "checkpoints" / str(step)
    target = set_up(saved_config(run)).abstract_state
    state, progress = change(*read(directory.parent, step, target))
    checkpoints = Checkpoints(run / "forged")
    checkpoints.save(state, progress, best_step=0)
    checkpoints.close()
    shutil.rmtree(directory)
    (run / "forged" / str(step)).rename(directory)
    shutil.rmtree(run / "forged")


@pytest.mark.parametrize("step", [3, 10])
def test_one_changed_parameter_is_rejected(step, run):
    def change(state, progress):
        leaves, tree = jax.tree.flatten(state.params)
        leaves[1].flat[0] = np.nextafter(leaves[1].flat[0], np.float32(9.0))
        return state.replace(params=jax.tree.unflatten(tree, leaves)), progress

    forge(run, step, change)
    if step == 10:  # the summary, too
        with pytest.raises(VerificationError, match=r"summary\.json does not tell of"):
            verify(run, count=0)
        (run / "summary.json").unlink()
    with pytest.raises(VerificationError, match=f"the checkpoint of step {step} is not what the"):
        verify(run, count=0)


def test_a_damaged_file_of_a_checkpoint_is_rejected(run):
    for path in (run / "checkpoints" / "6" / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(VerificationError, match="the checkpoint of step 6: "):
        verify(run, count=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.1000001), ("seed", 1), ("data.flip", False), ("optimizer.nesterov", True)],
)
def test_one_changed_line_of_the_recipe_is_rejected(name, value, run, capsys):
    edit(run / "config.json", **{name: value})
    with pytest.raises(SystemExit) as ended:
        main([str(run)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "was made with another configuration than that of config.json" in error


def test_a_recipe_that_was_changed_everywhere_is_rejected_by_the_replay(run):
    """Digests can be made up; what the recipe computes cannot."""
    edit(run / "config.json", learning_rate=0.1000001)
    fields = json.loads((run / "config.json").read_text())
    digest = config_digest(fields)
    edit(run / "summary.json", config=fields, config_sha256=digest)
    for step in (3, 6, 9, 10):
        forge(run, step, lambda state, progress: (state, progress | {"config_sha256": digest}))
    with pytest.raises(VerificationError, match="is not what the configuration makes"):
        verify(run, count=1)


def test_a_summary_of_another_recipe_is_rejected(run):
    summary = json.loads((run / "summary.json").read_text())
    edit(run / "summary.json", config=summary["config"] | {"learning_rate": 0.2})
    with pytest.raises(VerificationError, match=r"summary\.json was changed"):
        verify(run, count=1)


def test_what_is_no_run_is_one_line(tmp_path, run, capsys):
    with pytest.raises(UserError, match="is not the folder of a run"):
        verify(tmp_path, count=1)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(SystemExit) as ended:
        main([str(run)])
    assert ended.value.code == 2
    assert "has no checkpoints to replay from" in capsys.readouterr().err


def test_intervals_begin_with_the_initial_state():
    assert intervals([5]) == [(0, 5)]
    assert intervals([2, 4, 9]) == [(0, 2), (2, 4), (4, 9)]


def test_other_bits_of_another_machine_are_no_proof(honest, monkeypatch, capsys):
    monkeypatch.setattr(module, "replay", lambda *_: "0" * 64)
    with pytest.raises(SystemExit) as ended:
        main([str(honest), "--intervals=1"])
    assert ended.value.code == 1 and "is not what the configuration" in capsys.readouterr().err
    hardware = module.hardware
    monkeypatch.setattr(module, "hardware", lambda mesh: hardware(mesh) | {"threads": 77})
    with pytest.raises(SystemExit) as ended:
        main([str(honest), "--intervals=1"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "cannot be found out here" in said and "now 77" in said
    monkeypatch.undo()
    monkeypatch.setattr(module, "hardware", lambda mesh: hardware(mesh) | {"threads": 77})
    assert len(verify(honest, count=1)) == 1  # equal bits are a proof, wherever they are found
