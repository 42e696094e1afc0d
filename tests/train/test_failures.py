"""Every failure that a run promises to end well from, provoked for real."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mimicnorm_jax.config import default_config
from mimicnorm_jax.errors import RunError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.checkpoint import Checkpoints, read
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import digest
from mimicnorm_jax.train.watchdog import Watchdog
from tests.runs import ROOT, TINY, Run, logged_step, rows, saved_steps, summary

EVERY_STEP = "--config.checkpoint_every=0.01"
LONG = "--config.epochs=500"


@pytest.fixture
def tiny(tmp_path):
    """Arguments of a run in ``tmp_path / "run"``."""
    return (*TINY, f"--workdir={tmp_path / 'run'}")


def continues(tmp_path, tiny, *extra):
    """The same command goes on from a checkpoint and comes to its end."""
    with Run(tmp_path / "again", *tiny, *extra) as run:
        run.succeeds()
    return summary(tmp_path / "run")


# --- the file system


def in_namespace(script, *arguments):
    """Runs a shell script with a mount namespace of its own, as if it were root's."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-ec", script, "bash"]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    return subprocess.run(
        [*command, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
    )


def can_mount():
    if shutil.which("unshare") is None:
        return False
    return in_namespace("mount -t tmpfs -o size=64k none /mnt").returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="user namespaces are not allowed here")


@needs_mounts
@pytest.mark.parametrize("size", ["1200k"])
def test_a_full_disk_ends_the_run_and_leaves_its_checkpoints_whole(size, tmp_path):
    """A checkpoint of the tiny network takes 150 KiB; with ``keep_checkpoints=0`` all stay."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = in_namespace(
        f'mount -t tmpfs -o size={size} none "$1"; shift; saved=$1; folder=$2; shift 2;'
        '"$PYTHON" -m mimicnorm_jax.main "$@" && code=0 || code=$?;'
        'cp -r "$folder"/run "$saved"; exit $code',
        *(str(folder), str(tmp_path / "run"), str(folder)),
        *(*TINY, f"--workdir={folder / 'run'}", EVERY_STEP, "--config.keep_checkpoints=0", LONG),
    )
    assert done.returncode == 1, (done.stdout[-2000:], done.stderr[-3000:])
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    steps = saved_steps(tmp_path / "run")
    assert len(steps) > 1
    assert f"the checkpoint of step {steps[-1]} is kept" in error
    assert "No space left on device" in error or "RESOURCE_EXHAUSTED" in error
    assert "resume with the same command" in error
    # every checkpoint that is there can be read, and with more room the run goes on
    target = set_up(saved_config(tmp_path / "run")).abstract_state
    for step in steps:
        assert int(read(tmp_path / "run" / "checkpoints", step, target).state.step) == step
    got = continues(
        tmp_path,
        (*TINY, f"--workdir={tmp_path / 'run'}", LONG),
        f"--config.max_steps={steps[-1] + 3}",
    )
    assert got["resumed_from_step"] == steps[-1]


def saved_config(workdir):
    """The configuration of a run, from its folder."""
    config = default_config()
    fields = json.loads((workdir / "config.json").read_text())
    config.update_from_flattened_dict(
        {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if value is not None
        }
    )
    return config


@needs_mounts
def test_a_workdir_that_becomes_read_only_ends_the_run(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = in_namespace(
        'mount -t tmpfs -o size=64m none "$1"; folder=$1; saved=$2; shift 2;'
        '"$PYTHON" -m mimicnorm_jax.main "$@" & '
        'until ls "$folder"/run/checkpoints 2>/dev/null | grep -q "^[0-9]*$"; do sleep 0.1; done;'
        'mount --bind "$folder" "$folder"; mount -o remount,ro,bind "$folder"; cd "$folder";'
        "wait %1 && code=0 || code=$?;"
        'cp -r "$folder"/run "$saved"; exit $code',
        *(str(folder), str(tmp_path / "run")),
        *(*TINY, f"--workdir={folder / 'run'}", EVERY_STEP, LONG),
    )
    assert done.returncode == 1, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    error = done.stderr.splitlines()[-1]
    assert "Read-only file system" in error and " is kept" in error


def test_a_workdir_that_cannot_be_written_to_is_refused_at_once(tmp_path, tiny):
    done = in_namespace(
        'mount -t tmpfs none "$1"; mkdir "$1"/run; mount -o remount,ro "$1"; shift;'
        '"$PYTHON" -m mimicnorm_jax.main "$@"',
        *(str(tmp_path), *tiny),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workdir=") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_workdir_that_vanishes_ends_the_run(how, tmp_path, tiny):
    with Run(tmp_path / "out", *tiny, EVERY_STEP, LONG) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if how == "replaced":
            (tmp_path / "run").mkdir()
        assert run.wait(30) == [1]
        error = run.errors().splitlines()[-1]
    assert error.startswith("error: ") and "has vanished" in error
    steps = saved_steps(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    got = continues(tmp_path, tiny, LONG, f"--config.max_steps={steps[-1] + 2}")
    assert got["resumed_from_step"] == steps[-1]


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path, tiny):
    with Run(tmp_path / "out", *tiny, LONG) as first:
        first.wait_until(lambda: logged_step(tmp_path / "run") >= 2)
        before = {path for path in (tmp_path / "run").rglob("*") if "checkpoints" not in str(path)}
        with Run(tmp_path / "second", *tiny, LONG) as second:
            assert second.wait() == [2]
            (error,) = second.errors().splitlines()
        assert f"is in use by process {first[0].pid} on " in error
        assert before == {p for p in (tmp_path / "run").rglob("*") if "checkpoints" not in str(p)}
        assert first[0].poll() is None
        first[0].send_signal(signal.SIGTERM)
        first.succeeds()
    # a killed run holds nothing, whatever its file says
    with Run(tmp_path / "third", *tiny, LONG) as killed:
        killed.wait_until(lambda: "resumed" in killed.output())
        killed.kill()
    continues(tmp_path, tiny, LONG, f"--config.max_steps={saved_steps(tmp_path / 'run')[-1] + 1}")


# --- checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, and its digests."""
    root = tmp_path_factory.mktemp("two")
    arguments = (*TINY, f"--workdir={root / 'run'}", "--config.checkpoint_every=0.35")
    with Run(root / "out", *arguments, "--config.max_steps=16") as run:
        run.succeeds()
    assert saved_steps(root / "run") == [8, 16]
    return root / "run"


def files_of_a_checkpoint(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def zeroed(path):
    """A block of zeros, as a crash of the file system leaves it."""
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncated, emptied, missing, zeroed])
def test_no_damage_to_any_file_of_a_checkpoint_goes_unseen(harm, two_checkpoints, tmp_path, capsys):
    """What is restored is what was saved, or it is set aside for the checkpoint before it."""
    target = set_up(saved_config(two_checkpoints)).abstract_state
    pristine = two_checkpoints / "checkpoints"
    digests = {step: digest(read(pristine, step, target).state) for step in (8, 16)}
    files = files_of_a_checkpoint(pristine / "16")
    set_aside = []
    for number, name in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two_checkpoints, workdir)
        harm(workdir / "checkpoints" / "16" / name)
        restored = Checkpoints(workdir / "checkpoints").restore_latest(target)
        step = int(restored.state.step)
        assert digest(restored.state) == digests[step]
        reported = "checkpoint of step 16 is damaged" in capsys.readouterr().err
        assert reported == (step == 8) == (workdir / "damaged" / "16").is_dir()
        if reported:
            set_aside.append(str(name))
    # Orbax can do without some of its files, not without these
    for needed in ("state/manifest.ocdbt", "state/d/", "progress/metadata"):
        assert any(name.startswith(needed) for name in set_aside), (needed, set_aside, files)


def test_a_run_goes_on_past_damaged_checkpoints(two_checkpoints, tmp_path, tiny):
    """Also where an older checkpoint is damaged, which nobody reads."""
    expected = summary(two_checkpoints)
    for damaged in (8, 16):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(two_checkpoints, tmp_path / "run")
        (tmp_path / "run" / "summary.json").unlink()
        for path in (tmp_path / "run" / "checkpoints" / str(damaged)).rglob("*"):
            if path.is_file():
                emptied(path)
        extra = ("--config.checkpoint_every=0.35", "--config.max_steps=16")
        got = continues(tmp_path, tiny, *extra)
        assert got["resumed_from_step"] == (16 if damaged == 8 else 8)
        assert got["state_sha256"] == expected["state_sha256"]
        with Run(tmp_path / "eval", *tiny, *extra, "--mode=eval") as evaluation:
            results = json.loads("{" + evaluation.succeeds().partition("\n{")[2])
        assert results["latest"]["test_accuracy"] == expected["final_test_accuracy"]


# --- processes


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends(victim, tmp_path, tiny):
    with Run(tmp_path / "out", *tiny, EVERY_STEP, LONG, count=2) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        run[victim].kill()
        began = time.monotonic()
        codes = run.wait(30)
        assert time.monotonic() - began < 15
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
        if victim == 1:
            assert "error: lost another process" in run.errors(0)
    step = saved_steps(tmp_path / "run")[-1]
    got = continues(tmp_path, tiny, LONG, f"--config.max_steps={step + 2}")
    assert got["resumed_from_step"] == step


def test_when_one_process_fails_the_others_say_its_reason(tmp_path, tiny):
    """Process 0, which writes, loses its folder; process 1 would wait for it for ever."""
    with Run(tmp_path / "out", *tiny, EVERY_STEP, LONG, count=2) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        assert run.wait(30) == [1, 1]
        assert "has vanished" in run.errors(0)
        assert "process 0/2 ended: " in run.errors(1) and "has vanished" in run.errors(1)


def test_a_process_that_stands_still_is_given_up(tmp_path, tiny):
    """The other one, waiting in a collective, ends with all stacks after hang_minutes."""
    extra = (EVERY_STEP, LONG, "--config.hang_minutes=0.25")
    with Run(tmp_path / "out", *tiny, *extra, count=2) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        run[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert run[0].wait(60) == 1
        assert 10 < time.monotonic() - began < 45
        errors = run.errors(0)
        run[1].send_signal(signal.SIGCONT)
        assert run.wait(60)[1] != 0
    assert "no step for 0.25 minutes (config.hang_minutes)" in errors
    assert "(most recent call first)" in errors and "loop.py" in errors


def test_a_hang_of_a_single_process_prints_all_stacks_and_ends(tmp_path, tiny):
    """A worker that decodes images is stopped: the loop waits for its batch for ever."""
    from PIL import Image

    for split in ("train", "test"):
        for label in ("x", "y"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(40):
                pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    extra = (
        *("--config.data.name=folder", f"--config.data.dir={tmp_path / 'images'}"),
        *("--config.data.processes=1", "--config.data.cache_gib=0", "--config.hang_minutes=0.25"),
        *("--config.batch_size=16", LONG),
    )
    with Run(tmp_path / "out", *tiny, *extra) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 3)
        workers = children(run[0].pid)
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            assert run.wait(60) == [1]
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        errors = run.errors()
    assert "no step for 0.25 minutes (config.hang_minutes)" in errors
    assert "most recent call first" in errors and "loop.py" in errors


def children(pid):
    """Processes below one, their own children included."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_a_run_that_was_stopped_and_continued_did_not_hang(monkeypatch):
    """The watchdog counts the periods in which it was awake."""
    ended = []
    monkeypatch.setattr(Watchdog, "_end_hanging", lambda self: ended.append(1))
    with Watchdog(0.5 / 60) as watchdog:
        for _ in range(20):
            time.sleep(0.1)
            watchdog.beat()
        assert not ended
        time.sleep(2.0)
        assert ended


# --- signals


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_during_an_evaluation_saves_at_once(count, tmp_path, tiny):
    """The evaluation is made up for by the run that resumes."""
    extra = (
        *("--config.data.name=synthetic", "--config.data.num_examples=60000"),
        *("--config.data.image_size=8", "--config.batch_size=8", "--config.eval_every=0.001"),
        *("--config.epochs=0.01", "--config.checkpoint_every=1"),
    )
    with Run(tmp_path / "out", *tiny, *extra, count=count) as run:
        # the first evaluation, of 15,000 images in 1,875 batches, begins after step 8
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 8)
        time.sleep(0.3)
        began = time.monotonic()
        run[count - 1].send_signal(signal.SIGTERM)
        output = run.succeeds(30)
        assert time.monotonic() - began < 10
    assert "stopped by " in output and "after step 8; resume with the same command" in output
    assert saved_steps(tmp_path / "run") == [8]
    assert not any("test_loss" in row for row in rows(tmp_path / "run"))
    got = continues(tmp_path, tiny, *extra, "--config.max_steps=9")
    assert got["resumed_from_step"] == 8
    evaluated = [row["step"] for row in rows(tmp_path / "run") if "test_loss" in row]
    assert evaluated == [8, 9]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(number, tmp_path, tiny):
    """With a save of every step there is always one under way."""
    code = 75 if number == signal.SIGINT else 0
    extra = (EVERY_STEP, LONG, f"--stopped-exit-code={code}")
    with Run(tmp_path / "out", *tiny, *extra, count=2) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        run[1].send_signal(number)
        began = time.monotonic()
        assert run.wait(30) == [code, code], run.everything()
        assert time.monotonic() - began < 10
        output = run.output()
    step = saved_steps(tmp_path / "run")[-1]
    assert f"after step {step}; resume with the same command" in output
    got = continues(tmp_path, tiny, LONG, f"--config.max_steps={step + 2}")
    assert got["resumed_from_step"] == step


# --- numbers


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_config, tmp_path):
    """A label out of range makes one step's loss NaN."""
    config = tiny_config(max_steps=6, on_nonfinite="skip", log_every=1)
    experiment, bad_batch = poisoned(config, {2, 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up_together", lambda _: experiment)
        got = loop.train(config, tmp_path / "run")
    assert got["skipped_steps"] == 2 and got["steps"] == 6
    logged = rows(tmp_path / "run")
    counts = [row["skipped_steps"] for row in logged if "skipped_steps" in row]
    assert counts == [0, 0, 1, 1, 2, 2]
    losses = [row["train_loss"] for row in logged if "train_loss" in row]
    assert [loss is None for loss in losses] == [False, False, True, False, True, False]
    # a skipped step changes nothing but the count and the step
    state = experiment.initial_state()
    before = loop.host_copy(state)
    after = loop.host_copy(experiment.train_step(state, bad_batch)[0])
    assert int(after.step) == 1 and int(after.skipped) == 1
    for tree in ("params", "batch_stats"):
        np.testing.assert_equal(getattr(after, tree), getattr(before, tree))


def test_more_skipped_steps_than_the_limit_end_the_run(tiny_config, tmp_path):
    config = tiny_config(max_steps=9, on_nonfinite="skip", skip_limit=1)
    experiment, _ = poisoned(config, {2, 4, 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up_together", lambda _: experiment)
        with pytest.raises(RunError, match=r"2 steps were skipped \(config.skip_limit\).* step 5"):
            loop.train(config, tmp_path / "run")


def poisoned(config, steps):
    """The experiment, with the labels of some steps (from 0) out of range; and a bad batch."""
    experiment = set_up(config)
    pipeline = experiment.train_data
    original = pipeline.batches

    def poison(batch):
        return batch | {"label": np.full_like(batch["label"], 10**6)}

    def batches(start, stop):
        for step, batch in enumerate(original(start, stop), start):
            yield poison(batch) if step in steps else batch

    pipeline.batches = batches
    return experiment, shard_batch(poison(pipeline.batch(0)), experiment.mesh)
