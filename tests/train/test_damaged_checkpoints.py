"""Files of a checkpoint truncated, emptied, missing, zeroed."""

import json
import shutil

import pytest

from mimicnorm_jax.train.checkpoint import Checkpoints, read
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import digest
from mimicnorm_jax.train.workdir import saved_config
from tests.runs import (
    TINY,
    Run,
    continues,
    saved_steps,
    summary,
)


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


def test_readable_bits_that_are_not_those_that_were_saved_are_damage(two_checkpoints, tmp_path):
    """No decoder complains of them; the digest does."""
    target = set_up(saved_config(two_checkpoints)).abstract_state
    shutil.copytree(two_checkpoints / "checkpoints", tmp_path / "checkpoints")
    (path,) = (tmp_path / "checkpoints" / "16" / "progress").rglob("metadata")
    saved = digest(read(tmp_path / "checkpoints", 16, target).state)
    text = path.read_text()
    assert text.count(saved) == 1
    path.write_text(text.replace(saved, saved[::-1]))
    restored = Checkpoints(tmp_path / "checkpoints").restore_latest(target)
    assert int(restored.state.step) == 8
    assert (tmp_path / "damaged" / "16").is_dir()


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
