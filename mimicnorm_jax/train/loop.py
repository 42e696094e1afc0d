"""The training loop: steps, logging, evaluation, checkpoints, and stopping well."""

from __future__ import annotations

import collections
import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from mimicnorm_jax.config import flatten
from mimicnorm_jax.data.pipeline import prefetch
from mimicnorm_jax.errors import NonFiniteError, UserError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.checkpoint import Checkpoints, latest_step
from mimicnorm_jax.train.evaluation import evaluate, recalibrate
from mimicnorm_jax.train.metrics import MetricsWriter, plot_curves, read_rows
from mimicnorm_jax.train.progress import Progress, Throughput
from mimicnorm_jax.train.setup import Experiment, set_up
from mimicnorm_jax.train.state import count_parameters, digest
from mimicnorm_jax.train.workdir import (
    DataIdentity,
    Summary,
    check_data,
    check_workdir,
    data_identity,
    finished_summary,
    open_workdir,
    say_finished,
    write_json,
    write_summary,
)

# How far the host may run ahead of the device: far enough that the device never waits,
# near enough that the progress shown, and a stop on a bad loss, are not late.
_STEPS_IN_FLIGHT = 2


def train(config: ConfigDict, workdir: pathlib.Path) -> Summary | None:
    """Trains, or goes on training, the run of ``config`` in ``workdir``.

    Args:
      config: the configuration.
      workdir: the run's folder: checkpoints, ``metrics.jsonl``, ``curves.png``,
        ``summary.json``.

    Returns:
      The summary, or None if the run was told to stop before its end.

    Raises:
      UserError: a wrong input; nothing has been written.
      NonFiniteError: the run diverged; the last good checkpoint is kept.
    """
    check_workdir(workdir, config)
    summary = finished_summary(workdir)
    if summary and summary["config"]["max_steps"] == config.max_steps:
        say_finished(summary, workdir)
        return summary
    experiment = set_up(config)
    data = _check_run(experiment, workdir)
    if summary and summary["steps"] == experiment.total_steps:
        say_finished(summary, workdir)
        return summary
    open_workdir(workdir, config, data)
    _introduce(experiment, workdir)
    with contextlib.closing(
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    ) as checkpoints:
        return _Loop(experiment, workdir, checkpoints).run()


def evaluate_run(
    config: ConfigDict, workdir: pathlib.Path, *, exact: bool = False
) -> dict[str, Any]:
    """Evaluates the latest and the best checkpoint of a run on the test split.

    Args:
      config: the configuration.
      workdir: the run's folder.
      exact: also with the last BN's statistics of the whole training split.

    Returns:
      ``latest`` and ``best``, each with ``step``, ``test_loss``, ``test_accuracy`` and
      ``test_examples``, and the same as ``latest_recalibrated`` and ``best_recalibrated``
      if asked for; also written to ``eval.json`` in ``workdir``.

    Raises:
      UserError: a wrong input, or a folder without checkpoints.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"--workdir={workdir} has no checkpoints to evaluate; train it first")
    check_workdir(workdir, config)
    experiment = set_up(config)
    check_data(workdir, _identity(experiment))
    with contextlib.closing(Checkpoints(directory, keep=config.keep_checkpoints)) as checkpoints:
        best, _ = checkpoints.restore_best(experiment.abstract_state)
        latest = checkpoints.restore_latest(experiment.abstract_state)
    states = {"best": best} | ({} if latest is None else {"latest": latest[0]})
    if exact:
        states |= {f"{name}_recalibrated": recalibrate(experiment, s) for name, s in states.items()}
    results = {
        name: {"step": int(state.step)} | evaluate(experiment, state)
        for name, state in states.items()
    }
    write_json(workdir / "eval.json", results)
    return results


def _identity(experiment: Experiment) -> DataIdentity:
    return data_identity(experiment.train_data.source, experiment.test_data.source)


def _check_run(experiment: Experiment, workdir: pathlib.Path) -> DataIdentity:
    """Makes sure that ``workdir`` holds no longer run, and none on other images."""
    data = _identity(experiment)
    check_data(workdir, data)
    done = latest_step(workdir / "checkpoints")
    if done > experiment.total_steps:
        raise UserError(
            f"--workdir={workdir} holds a run of {done} steps already, more than the "
            f"{experiment.total_steps} of config.max_steps; choose another --workdir"
        )
    return data


def _introduce(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Prints the network, the configuration and where things go."""
    config = experiment.config
    print(
        parameter_overview.get_parameter_overview(
            experiment.abstract_state.params, include_stats=False
        )
    )
    print("\n".join(f"config.{name} = {value!r}" for name, value in flatten(config).items()))
    device = experiment.mesh.devices.flat[0]
    print(
        f"{config.network} with {config.method} on {experiment.mesh.size} "
        f"{device.device_kind} device(s): {len(experiment.train_data.source)} training and "
        f"{len(experiment.test_data.source)} test images, {experiment.total_steps} steps\n"
        f"everything goes to {workdir}",
        flush=True,
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; a second one acts as it would have without this."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


class _Loop:
    """One attempt at a run: from its latest checkpoint to its end or a stop signal."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints):
        self._began = time.monotonic()
        self._experiment = experiment
        self._config = experiment.config
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._best = {"best_test_accuracy": 0.0, "best_step": 0}
        self._since_log: list[dict[str, float]] = []  # of the steps since the last log line
        self._evaluation: dict[str, float] | None = None
        restored = checkpoints.restore_latest(experiment.abstract_state)
        if restored is None:
            self._state = experiment.initial_state()
        else:
            self._state, progress = restored
            self._since_log = progress.pop("since_log")
            self._best = progress
        self._first_step = self._step = int(self._state.step)
        self._in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._writer = MetricsWriter(workdir, self._step)
        self._progress = Progress(self._step, experiment.total_steps)
        self._throughput = Throughput()
        self._learning_rate = math.nan

    def run(self) -> Summary | None:
        """Runs to the end and returns the summary, or None after a stop signal."""
        total = self._experiment.total_steps
        if self._step:
            self._progress.say(f"resumed from the checkpoint of step {self._step}")
        if self._step < total:
            self._progress.say("compiling the training step …")
        try:
            with _stop_signals() as stop:
                for batch in self._batches():
                    self._advance(batch)
                    if stop and self._step < total:
                        self._check_state()
                        self._save()
                        self._progress.say(
                            f"stopped by {signal.Signals(stop[0]).name} after step {self._step}; "
                            "resume with the same command"
                        )
                        return None
            return self._finish()
        finally:
            self._writer.close()
            self._progress.close()

    def _batches(self) -> Iterator[Any]:
        """The batches that remain, on the devices; times how long they are waited for."""
        experiment = self._experiment
        host = experiment.train_data.batches(self._step, experiment.total_steps)
        ahead = prefetch(host, lambda batch: shard_batch(batch, experiment.mesh))
        with contextlib.closing(ahead):
            while True:
                with self._throughput.waiting():
                    batch = next(ahead, None)
                if batch is None:
                    return
                yield batch

    def _advance(self, batch: Any) -> None:
        self._state, metrics = self._experiment.train_step(self._state, batch)
        self._in_flight.append(metrics)
        self._step += 1
        first = self._step == self._first_step + 1
        while len(self._in_flight) > (0 if first else _STEPS_IN_FLIGHT):
            self._take_metrics()
        if first:  # mostly compilation, so it says nothing about the speed
            seconds = self._throughput.restart()
            self._progress.say(f"compiled and ran the first step in {seconds:.1f} s")
            self._progress.restart_clock()
        else:
            self._throughput.add(self._config.batch_size)
        self._progress.advance(self._step)
        at_end = self._step == self._experiment.total_steps
        if at_end or self._step % self._config.log_every == 0:
            self._log()
        evaluates = at_end or self._is_due(self._config.eval_every)
        saves = at_end or self._is_due(self._config.checkpoint_every)
        if evaluates or saves:
            self._check_state()
        self._evaluation = self._evaluate() if evaluates else None
        if saves or (evaluates and self._best["best_step"] == self._step):
            self._save()

    def _is_due(self, every_epochs: float) -> bool:
        """Whether this step completes another ``every_epochs`` epochs."""
        period = self._experiment.train_data.steps(every_epochs)
        return Fraction(self._step) // period > Fraction(self._step - 1) // period

    def _epoch(self) -> float:
        return float(self._step / self._experiment.train_data.steps(1))

    def _take_metrics(self) -> None:
        """Fetches the metrics of the oldest step in flight; stops the run if they are bad."""
        step = self._step - len(self._in_flight) + 1
        values = {name: x.item() for name, x in self._in_flight.popleft().items()}
        self._since_log.append(values)
        self._learning_rate = values["learning_rate"]
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                what = f"the {name.replace('_', ' ')} is {values[name]}"
                raise self._diverged(what, step, values["learning_rate"])

    def _check_state(self) -> None:
        """Stops the run if its state is no longer finite, so that it is never kept.

        A finite loss does not vouch for it: the loss is that of the state before the step.
        """
        self._drain()
        leaves = jax.tree.leaves(jax.device_get(self._state))
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            what = "a parameter or statistic is infinite or NaN"
            raise self._diverged(what, self._step, self._learning_rate)

    def _diverged(self, what: str, step: int, learning_rate: float) -> NonFiniteError:
        folder, kept = self._checkpoints.directory, self._checkpoints.latest_step()
        return NonFiniteError(
            f"{what} at step {step} (learning rate {learning_rate:.3g}); try, in a new --workdir, "
            "a lower config.learning_rate, more config.schedule.warmup_epochs or "
            "config.optimizer.clip_norm=1; "
            + (f"the checkpoint of step {kept} is kept in {folder}" if kept else "no step is kept")
        )

    def _drain(self) -> None:
        while self._in_flight:
            self._take_metrics()

    def _log(self) -> None:
        self._drain()
        rows, self._since_log = self._since_log, []
        row = {
            "step": self._step,
            "epoch": self._epoch(),
            "train_loss": sum(row["loss"] for row in rows) / len(rows),
            "train_accuracy": sum(row["correct"] for row in rows)
            / (len(rows) * self._config.batch_size),
            "learning_rate": rows[-1]["learning_rate"],
            "gradient_norm": rows[-1]["gradient_norm"],
            "images_per_second": self._throughput.rate(),
            "input_wait_fraction": self._throughput.wait_fraction,
        }
        self._writer.write(row)
        self._progress.show(row)

    def _evaluate(self) -> dict[str, float]:
        with self._throughput.paused():
            evaluation = evaluate(self._experiment, self._state)
            row = {"step": self._step, "epoch": self._epoch()}
            self._writer.write(row | evaluation)
            accuracy = evaluation["test_accuracy"]
            if accuracy > self._best["best_test_accuracy"]:
                self._best = {"best_test_accuracy": accuracy, "best_step": self._step}
            self._progress.say(
                f"epoch {row['epoch']:.2f}: test_accuracy {100 * accuracy:.2f}% "
                f"test_loss {evaluation['test_loss']:.4f} "
                f"(best {100 * self._best['best_test_accuracy']:.2f}%)"
            )
        return evaluation

    def _save(self) -> None:
        with self._throughput.paused():
            accuracy = None if self._evaluation is None else self._evaluation["test_accuracy"]
            progress = self._best | {"since_log": self._since_log}
            self._checkpoints.save(self._state, progress, accuracy)

    def _finish(self) -> Summary:
        evaluation = self._evaluation or evaluate(self._experiment, self._state)
        recalibrated, exact_line = None, ""
        if self._experiment.network.last_bn is not None:
            exact = recalibrate(self._experiment, self._state)
            recalibrated = evaluate(self._experiment, exact)["test_accuracy"]
            exact_line = f"with exact last-BN statistics: {recalibrated:.4f}\n"
        losses = [r["train_loss"] for r in read_rows(self._workdir) if "train_loss" in r]
        config = self._config
        title = f"{config.network}, {config.method}, {config.data.name}"
        picture = plot_curves(self._workdir, title)
        device = self._experiment.mesh.devices.flat[0]
        summary = write_summary(
            self._workdir,
            config,
            self._best
            | {
                "method": config.method,
                "network": config.network,
                "num_parameters": count_parameters(self._state.params),
                "steps": self._step,
                "resumed_from_step": self._first_step,
                "seconds": time.monotonic() - self._began,
                "images_per_second": self._throughput.total_rate(),
                "final_test_accuracy": evaluation["test_accuracy"],
                "final_test_loss": evaluation["test_loss"],
                "final_test_accuracy_recalibrated": recalibrated,
                "final_train_loss": losses[-1] if losses else None,
                "test_examples": evaluation["test_examples"],
                "state_sha256": digest(self._state),
                "jax_version": jax.__version__,
                "device_kind": device.device_kind,
                "num_devices": self._experiment.mesh.size,
                "finished": True,
            },
        )
        self._progress.say(
            f"final_test_accuracy {summary['final_test_accuracy']:.4f} "
            f"best_test_accuracy {summary['best_test_accuracy']:.4f} "
            f"after {summary['steps']} steps, {summary['seconds']:.0f} s\n"
            f"{exact_line}curves: {picture}\nsummary: {self._workdir / 'summary.json'}"
        )
        return summary
