"""A disk that is full, cannot be written to, or vanishes, for real; and a second run."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from mimicnorm_jax.train.checkpoint import read
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import saved_config
from tests.flags import QUICK
from tests.runs import EVERY_STEP, LONG, ROOT, TINY, Run, continues, logged_step, saved_steps


def in_namespace(script, *arguments):
    """Runs a shell script with a mount namespace of its own, as if it were root's."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-ec", script, "bash"]
    env = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    return subprocess.run(
        [*command, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def can_mount():
    if shutil.which("unshare") is None:
        return False
    return in_namespace("mount -t tmpfs -o size=64k none /mnt").returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="user namespaces are not allowed here")


@needs_mounts
def test_a_full_disk_ends_the_run_and_leaves_its_checkpoints_whole(tmp_path):
    """A checkpoint of the tiny network takes 150 KiB; with ``keep_checkpoints=0`` all stay."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = in_namespace(
        'mount -t tmpfs -o size=1200k none "$1"; shift; saved=$1; folder=$2; shift 2;'
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


@needs_mounts
def test_a_workdir_that_becomes_read_only_ends_the_run(tmp_path):
    """Read-only before it takes the folder's place: a mount with open files stays writable."""
    folder, read_only = tmp_path / "disk", tmp_path / "read_only"
    folder.mkdir()
    read_only.mkdir()
    done = in_namespace(
        'mount -t tmpfs -o size=64m none "$1"; folder=$1; read_only=$2; saved=$3; shift 3;'
        '"$PYTHON" -m mimicnorm_jax.main "$@" & '
        'until ls "$folder"/run/checkpoints 2>/dev/null | grep -q "^[0-9]*$"; do sleep 0.1; done;'
        'mount --bind "$folder" "$read_only"; mount -o remount,ro,bind "$read_only";'
        'mount --move "$read_only" "$folder"; cd "$folder";'
        "wait %1 && code=0 || code=$?;"
        'cp -r "$folder"/run "$saved"; exit $code',
        *(str(folder), str(read_only), str(tmp_path / "run")),
        *(*TINY, f"--workdir={folder / 'run'}", EVERY_STEP, LONG),
    )
    assert done.returncode == 1, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    error = done.stderr.splitlines()[-1]
    assert "Read-only file system" in error and " is kept" in error


@needs_mounts
def test_a_workdir_that_cannot_be_written_to_is_refused_at_once(tmp_path, tiny):
    done = in_namespace(
        'mount -t tmpfs none "$1"; mkdir "$1"/run; mount -o remount,ro "$1"; shift;'
        '"$PYTHON" -m mimicnorm_jax.main "$@"',
        *(str(tmp_path), *tiny),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workdir=") and done.stderr.count("\n") == 1


def stands_still(pid):
    """Whether all threads of a process are stopped, where the system tells of threads."""
    tasks = pathlib.Path(f"/proc/{pid}/task")
    if not tasks.is_dir():
        return True
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
    return set(states) == {"T"}


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_workdir_that_vanishes_ends_the_run(how, tmp_path, tiny):
    with Run(tmp_path / "out", *tiny, EVERY_STEP, LONG) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 5)
        run[0].send_signal(signal.SIGSTOP)  # which would write into a half-made copy
        run.wait_until(lambda: stands_still(run[0].pid))  # a signal is sent before it is heard
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if how == "replaced":  # as by a file system that was mounted again from a copy
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        run[0].send_signal(signal.SIGCONT)
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
