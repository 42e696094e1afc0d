"""Processes that are killed, fail, or hang."""

import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.train.watchdog import Watchdog
from tests.runs import (
    EVERY_STEP,
    LONG,
    Run,
    continues,
    descendants,
    logged_step,
    saved_steps,
    still_alive,
)


def decoded_in_processes(folder, count):
    """Arguments of a run whose images are decoded by worker processes."""
    for split in ("train", "test"):
        for label in ("x", "y"):
            (folder / split / label).mkdir(parents=True)
            for index in range(40):
                pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return (
        *("--config.data.name=folder", f"--config.data.dir={folder}", "--config.batch_size=16"),
        *(f"--config.data.processes={count}", "--config.data.cache_gib=0"),
    )


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
    assert "nothing goes on for 0.25 minutes (config.hang_minutes)" in errors
    assert "(most recent call first)" in errors and "loop.py" in errors


def test_a_hang_of_a_single_process_prints_all_stacks_and_ends(tmp_path, tiny):
    """A worker that decodes images is stopped: the loop waits for its batch for ever."""
    extra = (
        *decoded_in_processes(tmp_path / "images", 1),
        *("--config.hang_minutes=0.5", LONG),
    )
    with Run(tmp_path / "out", *tiny, *extra) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 3)
        workers = descendants(run[0].pid)
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            assert run.wait(120) == [1]
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        errors = run.errors()
    assert "nothing goes on for 0.5 minutes (config.hang_minutes)" in errors
    assert "most recent call first" in errors and "loop.py" in errors


def test_workers_end_with_the_run_that_is_killed(tmp_path, tiny):
    """SIGKILL leaves it no moment to end them, and they would wait for work for ever."""
    with Run(tmp_path / "out", *tiny, *decoded_in_processes(tmp_path / "images", 2), LONG) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 3)
        workers = descendants(run[0].pid)
        assert len(workers) >= 2
        run.kill()
    left = still_alive(workers)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


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


def test_what_goes_on_while_a_run_is_set_up_is_heard(monkeypatch):
    """Images are listed, decoded and measured behind bars, also where nobody looks."""
    ended = []
    monkeypatch.setattr(Watchdog, "_end_hanging", lambda self: ended.append(1))
    with Watchdog(1.0 / 60):
        for _ in progress_bar(range(8), "images", shown=False):
            time.sleep(0.25)
        assert not ended
    for _ in progress_bar(range(2)):  # which nobody listens to any more
        pass


def test_a_hang_while_a_run_is_set_up_ends_it(tmp_path, tiny):
    """A data set on a file system that does not answer: here a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "labels.csv")
    extra = (
        *("--config.data.name=folder", f"--config.data.dir={tmp_path}"),
        *("--config.data.labels_file=labels.csv", "--config.hang_minutes=0.05"),
    )
    with Run(tmp_path / "out", *tiny, *extra) as run:
        assert run.wait(60) == [1]
        errors = run.errors()
    assert "nothing goes on for 0.05 minutes" in errors and "most recent call first" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_process_that_compiles_for_longer_than_gloo_waits_is_waited_for(tmp_path, tiny):
    """Gloo gives the first collective 30 s: it is behind them before anything takes long."""
    extra = ("--config.network=resnet56", "--config.compilation_cache=", "--config.max_steps=3")
    (tmp_path / "cache").mkdir()
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    with Run(tmp_path / "out", *tiny, *extra, count=2, **cache) as run:
        run.wait_until(lambda: "compiling the training step" in run.output())
        run[1].send_signal(signal.SIGSTOP)
        time.sleep(45)
        run[1].send_signal(signal.SIGCONT)
        assert "finished" in run.succeeds(180) or (tmp_path / "run" / "summary.json").exists()
