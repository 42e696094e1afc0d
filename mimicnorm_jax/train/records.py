"""What a run notes of its steps and evaluations, and writes to its metrics."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from mimicnorm_jax.train.lock import WorkdirLock
from mimicnorm_jax.train.metrics import MetricsWriter, Row, chooses
from mimicnorm_jax.train.progress import Throughput

Metrics = dict[str, float]


class Records:
    """The metrics of one run.

    Attributes:
      since_log: those of the steps since the last line of metrics, oldest first; a checkpoint
        keeps them.
      best: step of the best evaluation, and its accuracies on the test images and on those held
        out; None where there are none.
      evaluation: that of the present state; None where there is none.
    """

    _ACCURACIES = ("test_accuracy", "holdout_accuracy")

    def __init__(self) -> None:
        self.since_log: list[Metrics] = []
        self.best: dict[str, Any] = {f"best_{name}": None for name in self._ACCURACIES}
        self.best["best_step"] = 0
        self.evaluation: Metrics | None = None
        self._most = -1.0  # of the accuracy that chooses
        self._writer: MetricsWriter | None = None

    def restore(self, since_log: list[Metrics], evaluations: Sequence[Row], step: int) -> None:
        """Takes up what a checkpoint and the evaluations up to its step say."""
        self.since_log = since_log
        # The metrics know better than the checkpoint: it may have been saved in the middle of
        # an evaluation that was made up for later.
        for row in evaluations:
            if row["step"] <= step:
                self._note_best(row)
            if row["step"] == step:
                self.evaluation = {
                    k: v for k, v in row.items() if k.startswith(("test_", "holdout_"))
                }

    def open(self, workdir: pathlib.Path, step: int, lock: WorkdirLock) -> None:
        """From now on rows are written to the folder of the run, while it is locked."""
        self._lock = lock
        self._writer = MetricsWriter(workdir, step)

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()

    def log(self, step: int, epoch: float, batch_size: int, speed: Throughput) -> Row:
        """Writes the metrics of the steps since the last time as one row, and returns it."""
        rows, self.since_log = self.since_log, []
        good = [row for row in rows if math.isfinite(row["loss"])]
        losses = [row["loss"] for row in good]
        floors = [row["loss_floor"] for row in good if "loss_floor" in row]
        row = {
            "step": step,
            "epoch": epoch,
            "train_loss": sum(losses) / len(losses) if losses else math.nan,
            "train_accuracy": sum(row["correct"] for row in rows) / (len(rows) * batch_size),
            "learning_rate": rows[-1]["learning_rate"],
            "gradient_norm": rows[-1]["gradient_norm"],
            "images_per_second": speed.rate(),
            "input_wait_fraction": speed.wait_fraction,
        }
        if floors:
            row["train_loss_floor"] = sum(floors) / len(floors)
        if "skipped" in rows[-1]:
            row["skipped_steps"] = rows[-1]["skipped"]
        self._write(row)
        return row

    def evaluated(self, step: int, epoch: float, evaluation: Metrics) -> None:
        """Writes an evaluation of the present state, and notes whether it is the best."""
        self.evaluation = evaluation
        row = {"step": step, "epoch": epoch} | evaluation
        self._write(row)
        self._note_best(row)

    def _note_best(self, row: Row) -> None:
        if chooses(row) > self._most:
            self._most = chooses(row)
            accuracies = {f"best_{name}": row.get(name) for name in self._ACCURACIES}
            self.best = accuracies | {"best_step": row["step"]}

    def _write(self, row: Row) -> None:
        if self._writer is not None:
            self._lock.check()
            self._writer.write(row)
