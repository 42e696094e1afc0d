import json
import os
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
    assert "\nverified: states" in output
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


def edit_metrics(run, change):
    path = run / "metrics.jsonl"
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("".join(line + "\n" for line in lines))


def test_accuracies_that_the_states_do_not_give_are_found(run):
    summary = json.loads((run / "summary.json").read_text())
    for name in ("final_test_accuracy", "best_test_accuracy"):
        edit(run / "summary.json", **summary | {name: 0.99})
        with pytest.raises(VerificationError, match=f"{name} is 0.99 in summary.json"):
            verify(run, count=1)
    # and in the lines of metrics, so that they do not contradict each other
    better = {"final_test_accuracy": 0.99, "best_test_accuracy": 0.99}
    edit(run / "summary.json", **summary | better)
    edit_metrics(run, lambda row: row | {k: 0.99 for k in row if k == "test_accuracy"})
    with pytest.raises(VerificationError, match=r"step 10 is not as good as claimed: test_acc"):
        verify(run, count=1)
    # of a run that has not ended there are only these
    (run / "summary.json").unlink()
    with pytest.raises(VerificationError, match=r"not as good as claimed: test_accuracy is 0\.99"):
        verify(run, count=0)


def test_exact_statistics_that_the_state_does_not_give_are_found(run):
    edit(run / "summary.json", final_test_accuracy_recalibrated=0.99)
    with pytest.raises(VerificationError, match=r"accuracy_recalibrated is 0\.99, and is found"):
        verify(run, count=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 12}, "tells of step 12, of which there is no checkpoint"),
        ({"best_step": 7, "best_test_accuracy": None}, "best_test_accuracy is None"),
        ({"best_step": 7}, "the best step is 7, of which there is no checkpoint"),
    ],
)
def test_results_of_states_that_are_not_there_are_found(fields, message, run):
    edit(run / "summary.json", **fields)
    with pytest.raises(VerificationError, match=message):
        verify(run, count=1)


def test_the_programs_that_a_run_keeps_are_not_run(run, monkeypatch):
    """A cache of compiled programs can hold any."""
    cache = run / "cache"
    cache.mkdir()
    (cache / "jit_train_step-cache").write_bytes(b"any")
    edit(run / "config.json", compilation_cache=str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    used = []
    replay = module.replay

    def look(*arguments):
        used.append(jax.config.jax_compilation_cache_dir)
        return replay(*arguments)

    monkeypatch.setattr(module, "replay", look)
    before = jax.config.jax_compilation_cache_dir
    try:
        assert len(verify(run, count=1)) == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert used and str(run) not in used[0]
    assert [path.name for path in cache.iterdir()] == ["jit_train_step-cache"]


def test_a_run_that_went_on_after_its_end_is_honest(tmp_path, tiny_config, capsys):
    """Its summary is of an earlier end, and of a checkpoint that is kept no more."""
    fields = {"network": "mlp", "checkpoint_every": 3 / 45, "keep_checkpoints": 1}
    train(tiny_config(max_steps=6, eval_every=3 / 45, **fields), tmp_path / "run")
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    train(tiny_config(max_steps=12, eval_every=3 / 45, **fields), tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_bytes(summary)  # as if it had been stopped there
    assert verify(tmp_path / "run", count=1)
    said = capsys.readouterr().out
    assert "summary.json is of before the run went on, and is not looked at" in said
    assert "evaluated as claimed: steps" in said


def test_a_loss_that_was_not_finite_claims_nothing(run):
    edit_metrics(run, lambda row: row | {k: None for k in row if k == "test_loss"})
    assert len(verify(run, count=1)) == 1


def test_a_little_less_may_come_of_another_machine(run):
    summary = json.loads((run / "summary.json").read_text())
    accuracy = summary["final_test_accuracy"] + 5e-4
    edit(run / "summary.json", final_test_accuracy=accuracy, best_test_accuracy=accuracy)
    edit_metrics(run, lambda row: row | {k: accuracy for k in row if k == "test_accuracy"})
    with pytest.raises(UserError, match="so little can come of another machine"):
        verify(run, count=1)


def test_averages_may_have_been_evaluated_with_other_statistics(tmp_path, tiny_config):
    """``config.optimizer.ema_batches`` may be changed while a run goes on."""
    fields = {"optimizer__ema_decay": 0.9, "optimizer__ema_batches": 2, "max_steps": 4}
    train(tiny_config(checkpoint_every=2 / 45, **fields), tmp_path / "run")
    assert verify(tmp_path / "run", count=1)
    edit_metrics(tmp_path / "run", lambda row: row | {k: 0.99 for k in row if k == "test_accuracy"})
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"config\.optimizer\.ema_batches = 2 batches, which may"):
        verify(tmp_path / "run", count=1)


def test_what_fails_while_it_is_looked_at_is_no_word_on_the_run(run, monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "replay", fails)
    with pytest.raises(SystemExit) as ended:
        main([str(run)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_links_in_a_circle_are_one_line(run):
    (run / "notes").symlink_to(run / "more")
    (run / "more").symlink_to(run / "notes")
    with pytest.raises(UserError):
        verify(run, count=1)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/6", "config.json", "summary.json"])
def test_links_out_of_a_run_are_not_followed(name, run, tmp_path, capsys):
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        main([str(run)])
    assert ended.value.code == 2
    assert f"{name} is a link that leads out of the run" in capsys.readouterr().err


def test_a_link_within_a_run_and_a_link_to_it_are(run, tmp_path):
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").symlink_to("kept")
    (tmp_path / "link").symlink_to(run)
    assert len(verify(tmp_path / "link", count=1)) == 1


def test_a_pipe_in_a_run_is_not_waited_for(run):
    (run / "summary.json").unlink()
    os.mkfifo(run / "summary.json")
    with pytest.raises(UserError, match=r"summary\.json is neither a file nor a folder"):
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


def test_a_run_that_moved_inside_an_interval_is_not_called_wrong(honest, monkeypatch, capsys):
    """The last checkpoint tells of one machine; another made the first steps, and left nothing."""
    monkeypatch.setattr(module, "replay", lambda *_: "0" * 64)
    read = module.read

    def moved(directory, step, target):
        found = read(directory, step, target)
        return found._replace(progress=found.progress | {"hardware_since": 2})

    monkeypatch.setattr(module, "read", moved)
    with pytest.raises(UserError, match=r"up to step 2 on another machine"):
        verify(honest, count=0)
    monkeypatch.setattr(module, "intervals", lambda steps: [(3, 6)])
    with pytest.raises(module.VerificationError):
        verify(honest, count=0)


def test_more_devices_than_there_are_are_no_reason_to_look_at_nothing(run, capsys):
    (path,) = (run / "checkpoints" / "10" / "progress").rglob("metadata")
    progress = json.loads(path.read_text())
    progress["hardware"]["num_devices"] = 64
    path.write_text(json.dumps(progress))
    assert len(verify(run, count=0)) == 4  # equal bits are a proof, wherever they are found


@pytest.mark.parametrize("forged", [{"network": "resnet50"}, {"method": "fixup"}, {"seed": 7}])
def test_what_a_summary_says_of_the_configuration_is_compared(forged, run):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | forged))
    (name,) = forged
    with pytest.raises(VerificationError, match=rf"summary\.json says {name} "):
        verify(run, count=1)
