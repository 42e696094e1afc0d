"""SIGTERM, SIGINT and SIGHUP, at inconvenient moments."""

import io
import os
import signal
import sys
import time

import pytest

from mimicnorm_jax.train import loop, stopping
from mimicnorm_jax.train.stopping import Stopped, StopRequest
from tests.runs import EVERY_STEP, LONG, Run, continues, logged_step, rows, saved_steps


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sigterm_during_an_evaluation_saves_at_once(count, tmp_path, tiny):
    """The evaluation is made up for by the run that resumes."""
    extra = (
        *("--config.data.name=synthetic", "--config.data.num_examples=30000"),
        *("--config.data.image_size=8", "--config.batch_size=8", "--config.eval_every=0.002"),
        *("--config.epochs=0.02", "--config.checkpoint_every=1"),
    )
    with Run(tmp_path / "out", *tiny, *extra, count=count) as run:
        # the first evaluation, of 7,500 images in 938 batches, begins after step 8
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


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT]
)
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(number, tmp_path, tiny):
    """With a save of every step there is always one under way.

    The run was resumed, so that its steps are not what the processes count to agree.
    """
    code = 75 if number == signal.SIGINT else 0
    extra = (EVERY_STEP, LONG, f"--stopped-exit-code={code}")
    continues(tmp_path, tiny, LONG, "--config.max_steps=200")
    with Run(tmp_path / "out", *tiny, *extra, count=2) as run:
        run.wait_until(lambda: logged_step(tmp_path / "run") >= 205)
        sent_at = logged_step(tmp_path / "run")
        run[1].send_signal(number)
        began = time.monotonic()
        assert run.wait(30) == [code, code], run.everything()
        assert time.monotonic() - began < 10
        output = run.output()
    step = saved_steps(tmp_path / "run")[-1]
    assert sent_at <= step < sent_at + 100
    assert f"after step {step}; resume with the same command" in output
    got = continues(tmp_path, tiny, LONG, f"--config.max_steps={step + 2}")
    assert got["resumed_from_step"] == step


def test_a_run_whose_output_nobody_reads_says_so(tiny, run_main):
    """As with ``| head``: not a broken workdir, and no traceback."""
    with run_main(*tiny, LONG, background=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == "error: what was reading the output has ended\n"


class TestHangup:
    """A closed terminal sends SIGHUP; ``nohup`` has it ignored."""

    @pytest.fixture(autouse=True)
    def _restored(self):
        before = signal.getsignal(signal.SIGHUP)
        yield
        signal.signal(signal.SIGHUP, before)

    def test_stops_as_sigterm_does(self):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Stopped, match="SIGHUP"):
                stop.raise_if_asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL

    def test_stays_ignored_where_it_is(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.raise_if_asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class TestEar:
    """While a step compiles, Python runs no handler of a signal."""

    @pytest.fixture(autouse=True)
    def _patience(self, monkeypatch):
        monkeypatch.setattr(stopping, "_PATIENCE", 0.2)

    def test_hears_what_the_main_thread_does_not(self):
        left = []
        with StopRequest(left.append):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.6)
        assert left == ["SIGTERM"]
        assert signal.set_wakeup_fd(-1) == -1

    @pytest.mark.parametrize("seen_to", ["a step was taken", "the main thread stops"])
    def test_leaves_it_to_the_main_thread(self, seen_to):
        left = []
        with StopRequest(left.append) as stop:
            if seen_to == "a step was taken":
                stop.something_to_lose()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped, match="SIGINT"):
                stop.raise_if_asked()
            time.sleep(0.5)
        assert not left


class TestLookout:
    """Processes leave before the first step together, or none does."""

    @pytest.fixture
    def told(self, monkeypatch):
        """What this process told the others; they were told to stop."""
        told = []
        monkeypatch.setattr(stopping, "_PATIENCE", 0.2)
        monkeypatch.setattr(stopping, "_PERIOD", 0.02)
        monkeypatch.setattr(stopping, "is_told_to_stop", lambda: True)
        monkeypatch.setattr(stopping, "leaves", told.append)
        return told

    @pytest.mark.parametrize("answers", [(None, None, True), (None, False)])
    def test_waits_for_all_answers(self, answers, told, monkeypatch):
        left, coming = [], iter(answers)
        monkeypatch.setattr(stopping, "all_leave", lambda: next(coming))
        lookout = stopping._Lookout(left.append)
        time.sleep(0.6)
        lookout.close()  # too late: it has said that it leaves
        assert told == [True] and bool(left) == answers[-1]

    def test_stays_where_a_step_was_taken(self, told, monkeypatch):
        left = []
        monkeypatch.setattr(stopping, "all_leave", lambda: pytest.fail("it asks nobody"))
        lookout = stopping._Lookout(left.append)
        time.sleep(0.1)
        lookout.close()
        assert told == [False] and not left

    def test_does_not_wait_for_a_process_that_is_lost(self, told, monkeypatch):
        left = []
        monkeypatch.setattr(stopping, "all_leave", lambda: None)
        lookout = stopping._Lookout(left.append)
        time.sleep(0.3)
        began = time.monotonic()
        lookout.close()
        assert time.monotonic() - began < 3 and told == [True] and not left


def test_a_terminal_that_is_closed_is_no_reason_to_stay(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            self.write("")

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", Closed())
    loop._leave("SIGHUP", 75)
    assert codes == [75]


@pytest.mark.parametrize(
    ("count", "number", "said"),
    [
        (1, signal.SIGTERM, "SIGTERM"),
        pytest.param(1, signal.SIGINT, "SIGINT", marks=pytest.mark.long),
        (2, signal.SIGTERM, "SIGTERM or preemption"),
        pytest.param(2, signal.SIGHUP, "SIGTERM or preemption", marks=pytest.mark.long),
    ],
)
def test_a_stop_while_the_step_compiles_is_answered_at_once(count, number, said, tmp_path, tiny):
    """By all processes, whichever is told."""
    extra = ("--config.network=resnet110", "--config.compilation_cache=", LONG)
    (tmp_path / "cache").mkdir()
    with Run(
        tmp_path / "out",
        *(*tiny, *extra, "--stopped-exit-code=75"),
        count=count,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
    ) as run:
        run.wait_until(lambda: "compiling the training step" in run.output())
        time.sleep(1.0)
        began = time.monotonic()
        run[count - 1].send_signal(number)
        assert run.wait(60) == [75] * count
        assert time.monotonic() - began < 5
        assert f"stopped by {said} before a step; resume with the same" in run.output()
        assert "compiled and ran" not in run.output()
