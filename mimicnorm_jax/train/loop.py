"""The training loop: steps, logging, evaluation, checkpoints, and stopping well."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from ml_collections import ConfigDict

from mimicnorm_jax.errors import RunError, UserError, refused_by_system
from mimicnorm_jax.parallel import coordination, replicate
from mimicnorm_jax.train import messages
from mimicnorm_jax.train.calibrated import Calibration, calibrate, write_calibrations
from mimicnorm_jax.train.checkpoint import Checkpoints, latest_step
from mimicnorm_jax.train.evaluation import averaged, evaluate, outputs_of, recalibrate
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.finite import FiniteCheck
from mimicnorm_jax.train.first_batch import NAME as FIRST_BATCH
from mimicnorm_jax.train.first_batch import draw_first_batch
from mimicnorm_jax.train.lock import WorkdirLock
from mimicnorm_jax.train.metrics import Pending, evaluations
from mimicnorm_jax.train.opening import check_run, explained, opened
from mimicnorm_jax.train.progress import Progress, Throughput
from mimicnorm_jax.train.provenance import (
    config_as_json,
    config_digest,
    differences,
    hardware,
)
from mimicnorm_jax.train.records import Records
from mimicnorm_jax.train.setup import set_up_together
from mimicnorm_jax.train.state import TrainState, host_copy
from mimicnorm_jax.train.stopping import Stopped, StopRequest
from mimicnorm_jax.train.summary import summarize
from mimicnorm_jax.train.watchdog import Watchdog
from mimicnorm_jax.train.workdir import (
    Summary,
    check_workdir,
    finished_summary,
)

# How far the host may run ahead of the device: far enough that the device never waits,
# near enough that the progress shown, and a stop on a bad loss, are not late.
_CALLS_IN_FLIGHT = 2


def train(
    config: ConfigDict, workdir: pathlib.Path, *, leave_with: int | None = None
) -> Summary | None:
    """Trains, or goes on training, the run of ``config`` in ``workdir``.

    In a run of several processes each calls it; process 0 writes.

    Args:
      config: the configuration.
      workdir: the run's folder: checkpoints, ``metrics.jsonl``, ``curves.png``,
        ``summary.json``. All processes share it.
      leave_with: exit code of the process where it is told to stop while its first step compiles,
        which can take minutes and saves nothing; None where it is not the run's own.

    Returns:
      The summary, or None if the run was told to stop before its end.

    Raises:
      UserError: a wrong input; nothing has been written.
      NonFiniteError: the run diverged; the last good checkpoint is kept.
      RunError: it cannot go on, such as on a full disk; older checkpoints are kept.
    """
    with Watchdog(config.hang_minutes or None) as watchdog:
        return _train(config, workdir, watchdog, leave_with)


def _train(
    config: ConfigDict, workdir: pathlib.Path, watchdog: Watchdog, leave_with: int | None
) -> Summary | None:
    coordination.together("workdir", lambda: check_workdir(workdir, config))
    summary = coordination.exchange("finished", finished_summary(workdir))[0]
    if summary and _asks_the_same(summary["config"], config):
        return _already(summary, workdir)
    experiment = set_up_together(config, workdir)
    coordination.together("run", lambda: check_run(experiment, workdir))
    if summary and summary["steps"] == experiment.total_steps:
        return _already(summary, workdir)
    with opened(experiment, workdir) as lock:
        if coordination.is_first():
            messages.introduce(experiment, workdir)
            if not latest_step(workdir / "checkpoints"):
                with refused_by_system(f"--workdir={workdir} cannot be written to"):
                    draw_first_batch(experiment, workdir / FIRST_BATCH)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
        with (
            explained(workdir, lock),
            StopRequest(None if leave_with is None else lambda by: _leave(by, leave_with)) as stop,
        ):
            return _Loop(experiment, workdir, checkpoints, lock, watchdog, stop).run()


def _leave(by: str, code: int) -> NoReturn:
    if coordination.is_first():
        with contextlib.suppress(OSError):  # a terminal that is closed
            print(f"\nstopped by {by} before a step; resume with the same command", flush=True)
    coordination.leave(code)


def _asks_the_same(before: dict[str, Any], config: ConfigDict) -> bool:
    """Whether a finished run needs no look at the data: those elsewhere may be others."""
    return all(
        name in before and before[name] == config_as_json(config)[name]
        for name in ("data.dir", "max_steps")
    )


def _already(summary: Summary, workdir: pathlib.Path) -> Summary:
    if coordination.is_first():
        messages.say_finished(summary, workdir)
    return summary


class _Loop:
    """One attempt at a run: from its latest checkpoint to its end or a stop signal."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        lock: WorkdirLock,
        watchdog: Watchdog,
        stop: StopRequest,
    ):
        self._began = time.monotonic()
        self._experiment = experiment
        self._config = experiment.config
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._lock = lock
        self._watchdog = watchdog
        self._stop = stop
        self._records = Records()
        self._finite = FiniteCheck(experiment.config, checkpoints)
        self._host: TrainState | None = None  # the present state, once it was looked at
        self._restore()
        self._first_step = self._step = int(self._state.step)
        self._in_flight = Pending(self._config.optimizer.label_smoothing)
        speaks = coordination.is_first()
        if speaks:
            self._records.open(workdir, self._step, lock)
        self._progress = Progress(self._step, experiment.total_steps, quiet=not speaks)
        self._throughput = Throughput()

    def _restore(self) -> None:
        experiment = self._experiment
        restored = self._checkpoints.restore_latest(experiment.abstract_state)
        self._saved_on: dict[str, Any] = {}
        self._hardware_since = 0
        self._is_changed = False
        self._config_sha256 = config_digest(config_as_json(self._config))
        if restored is None:
            self._state = experiment.initial_state()
            return
        self._state = replicate(restored.state, experiment.mesh)
        self._saved_on = restored.progress["hardware"]
        coordination.together("machine", self._check_machine)
        self._is_changed = restored.progress.get("config_sha256") != self._config_sha256
        moved = self._saved_on != hardware(experiment.mesh)
        step = int(restored.state.step)
        self._hardware_since = step if moved else restored.progress.get("hardware_since", 0)
        rows = coordination.exchange("evaluations", evaluations(self._workdir))[0]
        self._records.restore(restored.progress["since_log"], rows, step)

    def _check_machine(self) -> None:
        """Refuses to go on where ``config.require_same_machine`` says so."""
        now = hardware(self._experiment.mesh)
        differing = differences(self._saved_on, now) if coordination.is_first() else []
        if differing and self._config.require_same_machine:
            raise UserError(
                f"--workdir={self._workdir} was saved by a run that computed otherwise: "
                f"{'; '.join(differing)}{messages.remedy(differing)}; to go on all the same: "
                "--config.require_same_machine=false"
            )

    def run(self) -> Summary | None:
        """Runs to the end and returns the summary, or None after a stop signal."""
        try:
            try:
                summary = self._run()
            except Stopped as stop:
                summary = None
                self._stop_here(stop)
            self._close()
        finally:
            with contextlib.suppress(OSError, RunError):  # what follows from another error
                self._close()
        return summary

    def _close(self) -> None:
        self._progress.close()
        self._records.close()
        self._checkpoints.close()

    def _run(self) -> Summary:
        total = self._experiment.total_steps
        if self._step:
            self._progress.say(messages.resumed(self._experiment, self._step, self._saved_on))
            if self._is_changed:
                self._progress.say(messages.CHANGED)
        evaluated = self._records.evaluation is not None
        if self._step and not evaluated and self._experiment.due(self._step).evaluation:
            self._evaluate()  # what a stop interrupted
        if self._step < total:
            self._progress.say("compiling the training step …")
        for batches in self._calls():
            self._advance(batches)
            self._tick()
        return self._finish()

    def _tick(self) -> None:
        """Once a call, and once a batch of an evaluation: all is well, and nobody wants to stop."""
        self._watchdog.beat()
        self._checkpoints.check()
        self._stop.raise_if_asked()

    def _stop_here(self, stop: Stopped) -> None:
        self._drain()
        self._save()
        self._checkpoints.close()
        coordination.wait_for_all("stopped")
        self._progress.say(
            f"stopped by {stop} after step {self._step}; resume with the same command"
        )

    def _batches(self) -> Iterator[Any]:
        """The batches that remain, on the devices; times how long they are waited for."""
        ahead = self._experiment.batches(self._step, self._experiment.total_steps)
        with contextlib.closing(ahead):
            while True:
                with self._throughput.waiting():
                    batch = next(ahead, None)
                if batch is None:
                    return
                yield batch

    def _calls(self) -> Iterator[list[Any]]:
        """The batches of each call of the devices, which ends where the host has work to do."""
        batches: list[Any] = []
        for batch in self._batches():
            batches.append(batch)
            is_full = len(batches) == self._experiment.steps_per_call
            if is_full or any(self._experiment.due(self._step + len(batches))):
                yield batches
                batches = []

    def _advance(self, batches: list[Any]) -> None:
        first = self._step == self._first_step
        self._state, metrics = self._experiment.train(self._state, batches)
        self._host = self._records.evaluation = None
        self._in_flight.add(self._step + 1, len(batches), metrics)
        self._step += len(batches)
        while len(self._in_flight) > (0 if first else _CALLS_IN_FLIGHT):
            self._take_metrics()
        self._stop.something_to_lose()
        if first:  # mostly compilation, so it says nothing about the speed
            seconds = self._throughput.restart()
            self._progress.say(f"compiled and ran the first step in {seconds:.1f} s")
            self._progress.restart_clock()
        else:
            self._throughput.add(len(batches) * self._config.batch_size)
        self._progress.advance(self._step)
        due = self._experiment.due(self._step)
        if due.log:
            self._drain()
            size, speed = self._config.batch_size, self._throughput
            self._progress.show(self._records.log(self._step, self._epoch(), size, speed))
        if due.evaluation:
            self._evaluate()
        is_best = due.evaluation and self._records.best["best_step"] == self._step
        if is_best or due.checkpoint:
            self._save()

    def _epoch(self) -> float:
        return float(self._step / self._experiment.train_data.steps(1))

    def _take_metrics(self) -> None:
        """Fetches the metrics of the oldest call in flight; stops the run if they are bad."""
        for step, values in self._in_flight.take():
            self._records.since_log.append(values)
            self._finite.metrics(step, values)

    def _checked_state(self) -> TrainState:
        """The state on the host; stops the run if it is no longer finite, so it is never kept."""
        self._drain()
        if self._host is None:
            self._host = host_copy(self._state)
            self._finite.state(self._step, self._host)
        return self._host

    def _drain(self) -> None:
        while self._in_flight:
            self._take_metrics()

    def _evaluate(self) -> None:
        with self._throughput.paused():
            self._checked_state()
            found = evaluate(self._experiment, self._state, self._tick)
            self._records.evaluated(self._step, self._epoch(), found)
            best = self._records.best["best_test_accuracy"]
            self._progress.say(messages.evaluated(self._epoch(), found, best))

    def _save(self) -> None:
        with self._throughput.paused():
            state = self._checked_state()
            self._lock.check()
            progress = {
                "since_log": self._records.since_log,
                "hardware": hardware(self._experiment.mesh),
                "hardware_since": self._hardware_since,  # this step
                "config_sha256": self._config_sha256,
            }
            self._checkpoints.save(state, progress, best_step=self._records.best["best_step"])

    def _finish(self) -> Summary:
        self._stop.something_to_lose()  # also where no step was left
        evaluation = self._records.evaluation
        assert evaluation is not None
        recalibrated: dict[str, float] = {}
        if self._experiment.network.last_bn is not None:
            exact = recalibrate(self._experiment, self._state, self._tick)
            recalibrated = evaluate(self._experiment, exact, self._tick)
        self._checkpoints.close()  # before the summary says that the run is finished
        calibration = self._calibrate()
        summary = summarize(
            self._experiment,
            self._workdir,
            self._checked_state(),
            self._records.best
            | {
                "resumed_from_step": self._first_step,
                "seconds": time.monotonic() - self._began,
                "images_per_second": self._throughput.total_rate(),
                "final_test_accuracy": evaluation.get("test_accuracy"),
                "final_test_loss": evaluation.get("test_loss"),
                "final_holdout_accuracy": evaluation.get("holdout_accuracy"),
                "best_chosen_by": "holdout" if "holdout_accuracy" in evaluation else "test",
                "final_test_accuracy_recalibrated": recalibrated.get("test_accuracy"),
                "final_holdout_accuracy_recalibrated": recalibrated.get("holdout_accuracy"),
                "test_examples": evaluation.get("test_examples"),
                "calibration": calibration,
            },
        )
        self._progress.say(messages.finished(summary, self._workdir))
        coordination.wait_for_all("finished")
        return summary

    def _calibrate(self) -> Calibration | None:
        """Fits the temperatures of the best state and of the last; returns that of the best."""
        experiment, best_step = self._experiment, self._records.best["best_step"]
        if experiment.holdout_data is None:
            return None
        states = {self._step: self._state}
        if best_step not in states:
            best = self._checkpoints.restore_best(experiment.abstract_state, {best_step: 1.0})
            states[int(best.state.step)] = replicate(best.state, experiment.mesh)
        found: dict[int, Calibration] = {}
        for step, state in states.items():
            state = averaged(experiment, state, self._tick)
            split = experiment.holdout_data
            found[step] = calibrate(outputs_of(experiment, state, split, self._tick))
        if coordination.is_first():
            self._lock.check()
            write_calibrations(self._workdir, found)
        return found.get(best_step)
