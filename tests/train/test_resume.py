"""Invariant 5: kill the process anywhere, start it again: the same bits at the end."""

import json
import random
import signal
import time

import pytest

TIMED = ("images_per_second", "input_wait_fraction")
EPOCHS, STEPS = 4.0, 90  # 1,437 digits in batches of 64: 22.5 steps an epoch
SAME = (
    *("state_sha256", "steps", "final_test_accuracy", "final_test_loss", "final_train_loss"),
    *("best_test_accuracy", "best_step"),
)


@pytest.fixture
def command(tmp_path):
    def make(name, *extra):
        return [
            "--config=configs/digits_resnet20.py",
            f"--workdir={tmp_path / name}",
            "--config.network=resnet8",
            "--config.width=0.5",
            "--config.data.image_size=8",
            f"--config.epochs={EPOCHS}",
            "--config.checkpoint_every=0.5",
            "--config.log_every=7",
            *extra,
        ]

    return make


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, workdir, step):
    """Waits until a step is logged and, before it, a checkpoint is complete."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        saved = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        try:
            logged = max((row["step"] for row in rows(workdir)), default=0)
        except json.JSONDecodeError:  # read in the middle of a line
            continue
        if saved and logged >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_killed_runs_end_with_the_bits_of_the_uninterrupted_run(command, tmp_path, run_main):
    whole = run_main(*command("whole"))
    assert whole.returncode == 0, whole.stderr
    expected = summary(tmp_path / "whole")
    assert expected["steps"] == STEPS and expected["resumed_from_step"] == 0
    assert expected["finished"] is True and expected["test_examples"] == 360

    for number, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        name = number.name
        process = run_main(*command(name), background=True)
        wait_for_step(process, tmp_path / name, random.randint(13, 60))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        if number == signal.SIGTERM:
            assert "stopped by SIGTERM" in stdout and "resume with the same command" in stdout
        assert not (tmp_path / name / "summary.json").exists()
        again = run_main(*command(name))
        assert again.returncode == 0, again.stderr
        got = summary(tmp_path / name)
        assert 0 < got["resumed_from_step"] < STEPS
        for field in SAME:
            assert got[field] == expected[field], (name, field)
        # what was logged is that of one run too: no step twice, none missing, the same means
        logged, uninterrupted = (
            [{k: v for k, v in row.items() if k not in TIMED} for row in rows(path)]
            for path in (tmp_path / name, tmp_path / "whole")
        )
        assert logged == uninterrupted
        assert [r["step"] for r in logged if "train_loss" in r] == [*range(7, STEPS, 7), STEPS]

    finished = run_main(*command("whole"))
    assert finished.returncode == 0
    assert "is finished" in finished.stdout
    assert summary(tmp_path / "whole") == expected


def test_another_seed_is_another_run(command, tmp_path, run_main):
    for name, seed in (("a", 0), ("b", 1)):
        assert (
            run_main(*command(name, f"--config.seed={seed}", "--config.max_steps=3")).returncode
            == 0
        )
    digests = [summary(tmp_path / name)["state_sha256"] for name in "ab"]
    assert digests[0] != digests[1]
