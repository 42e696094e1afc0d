"""A checkpoint that the system does not hand out is not damaged: nothing is moved."""

import contextlib
import errno
import json
import os
import resource
import shutil
import tracemalloc  # noqa: F401 (pytest would open it for a warning, where nothing opens)

import pytest

from mimicnorm_jax.errors import RunError
from mimicnorm_jax.tools.verify import main as verify
from mimicnorm_jax.train import checkpoint
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.unreadable import why_unreadable
from mimicnorm_jax.train.workdir import saved_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("unreadable") / "run"
    train(tiny_config(network="mlp", max_steps=4, checkpoint_every=2 / 45), workdir)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def target(saved):
    return set_up(saved_config(saved)).abstract_state


@contextlib.contextmanager
def no_file_more():
    """The system opens no file for this process: EMFILE, which no permission of root changes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = os.open(os.devnull, os.O_RDONLY)
    os.close(unused)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def assert_nothing_moved(run):
    assert not (run / "damaged").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's coroutine
def test_a_system_that_opens_no_file_is_no_damage(run, target):
    checkpoints = Checkpoints(run / "checkpoints")
    assert int(checkpoints.restore_latest(target).state.step) == 4
    with no_file_more(), pytest.raises(RunError, match="read now: Too many open files"):
        checkpoints.restore_latest(target)
    with no_file_more(), pytest.raises(RunError, match="read now: Too many open files"):
        checkpoint.read(checkpoints.directory, 4, target)
    assert_nothing_moved(run)
    assert int(checkpoints.restore_latest(target).state.step) == 4


def tensorstore(number):
    """As TensorStore words it; it has no exception of its own."""
    return ValueError(f"UNKNOWN: Error reading \"a/0\": Failed to read [os_error_code='{number}']")


HICCUPS = [
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    (MemoryError(), "out of memory"),
    (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"), "out of memory"),
    (tensorstore(errno.EACCES), "Permission denied"),
    (tensorstore(errno.EIO), "Input/output error"),
    (ExceptionGroup("two", [ValueError("x"), tensorstore(errno.EIO)]), "Input/output error"),
]


@pytest.mark.parametrize(("error", "reason"), HICCUPS)
def test_every_hiccup_ends_in_one_line_and_moves_nothing(error, reason, run, target, monkeypatch):
    def fails(*_):
        raise RuntimeError("orbax") from error

    monkeypatch.setattr(checkpoint, "_read", fails)
    checkpoints = Checkpoints(run / "checkpoints")
    for restore in (checkpoints.restore_latest, lambda t: checkpoints.restore_best(t, {2: 1.0})):
        with pytest.raises(RunError, match=rf"cannot be read now: {reason}; it stays") as raised:
            restore(target)
        assert "\n" not in str(raised.value)
    assert_nothing_moved(run)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        FileNotFoundError("Individual parameter subdirectory not found"),
        tensorstore(errno.ENOENT),
        ValueError("DATA_LOSS: checksum"),
        KeyError("state"),
    ],
)
def test_what_is_absent_or_wrong_is_damage(error, run):
    assert why_unreadable(error, run / "checkpoints" / "4") is None


def test_verify_does_not_call_it_wrong(run, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_read", fails)
    with pytest.raises(SystemExit) as ended:
        verify([str(run)])
    assert ended.value.code == 2
    assert "cannot be read now: Input/output error" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_and_files_without_permission(run, target):
    for name in ("4", "4/state"):
        path = run / "checkpoints" / name
        path.chmod(0)
        with pytest.raises(RunError, match="Permission denied"):
            Checkpoints(run / "checkpoints").restore_latest(target)
        path.chmod(0o755)
        assert_nothing_moved(run)


@pytest.mark.parametrize(
    ("progress", "name"),
    [
        ({"hardware": None}, "hardware"),
        ({"since_log": {}}, "since_log"),
        ({"since_log": [{"loss": "low"}]}, "since_log"),
        ({"state_sha256": 5}, "state_sha256"),
    ],
)
def test_progress_of_another_kind_is_damage(progress, name, run, target, capsys):
    (path,) = (run / "checkpoints" / "4" / "progress").rglob("metadata")
    path.write_text(json.dumps(json.loads(path.read_text()) | progress))
    assert int(Checkpoints(run / "checkpoints").restore_latest(target).state.step) == 2
    assert name in capsys.readouterr().err
    assert (run / "damaged" / "4").is_dir()
