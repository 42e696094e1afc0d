"""What a run leaves to read: metrics.jsonl, TensorBoard event files, curves.png."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.layers import last_bn_loss_floor
from mimicnorm_jax.train.json_files import (
    NUMBER_OR_NULL,
    check_kinds,
    parse_object,
    replace_text,
    without_link,
)

Row = dict[str, Any]

_SPLITS = ("train", "test", "holdout")  # as their curves are called

_SECONDS_BETWEEN_FLUSHES = 10.0  # of event files: each waits for the disk


_ACCURACIES = {"test_accuracy", "holdout_accuracy"}  # which an evaluation has, always
_EXACT = 1e-3  # nats, of the floor of a loss: it is computed at every step


class Pending:
    """Metrics of calls of the devices that may not have been computed yet.

    Args:
      label_smoothing: of the loss.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing
        self._calls: collections.deque[tuple[int, int, dict[str, jax.Array]]] = collections.deque()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, first_step: int, count: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a call of ``count`` steps."""
        self._calls.append((first_step, count, metrics))

    def take(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Waits for the oldest call; yields the number and the metrics of each of its steps.

        In place of ``class_counts`` there is ``loss_floor``: what the last BN makes the least
        loss of that batch.
        """
        first, count, metrics = self._calls.popleft()
        found = jax.device_get(metrics)
        if found["loss"].ndim == 0:  # of a single step
            found = {name: x[None] for name, x in found.items()}
        floors = [self._floor(counts) for counts in found.pop("class_counts", [])[:count]]
        rows = {name: x.tolist() for name, x in found.items()}
        rows |= {"loss_floor": floors} if floors else {}
        for i in range(count):
            yield first + i, {name: values[i] for name, values in rows.items()}

    def _floor(self, counts: np.ndarray) -> float:
        if not counts.any():  # labels out of range, whose loss is NaN too
            return math.nan
        smoothing = self._label_smoothing
        return last_bn_loss_floor(counts, label_smoothing=smoothing, tolerance=_EXACT)


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and to TensorBoard event files.

    Writing goes on where the run goes on: what was logged after the checkpoint a run
    resumes from is dropped first, so the files read as if nothing had happened. The event files
    of earlier attempts, which lack their last seconds after a SIGKILL, become one of those rows.

    Args:
      workdir: the run's folder.
      step: step the run starts or resumes at; later rows of an earlier attempt go.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(workdir) if row["step"] <= step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a")
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        times = {step: at for path in earlier for step, at in _times_of_steps(path)}
        # Not SummaryWriter: its thread dies silently on a full disk, and then it waits forever.
        # Its name has the second: of a process that resumes at once there must be two.
        suffix = f".{os.getpid()}.{len(earlier)}"
        self._events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
        self._flushed = time.monotonic()
        for row in kept:
            self._write_events(row, times.get(row["step"], time.time()))
        self._events.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        """Writes one row; ``row["step"]`` is its step.

        What is not finite becomes null: JSON has no word for it.
        """
        row = {name: value if _is_finite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._write_events(row, time.time())
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._events.flush()
            self._flushed = time.monotonic()

    def _write_events(self, row: Row, wall_time: float) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                summary = scalar(name, value)
                event = Event(wall_time=wall_time, step=row["step"], summary=summary)
                self._events.write_event(event)

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._file.closed:
            with contextlib.closing(self._events):
                self._file.close()


def _times_of_steps(path: pathlib.Path) -> Iterator[tuple[int, float]]:
    """Steps that an event file has, and when they were written; it may end in the middle of one.

    A record is its length in 8 bytes, 4 bytes of checksum, the event, and 4 bytes of checksum.
    """
    content, at = path.read_bytes(), 0
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        record = content[at + 12 : at + 12 + length]
        if len(record) < length:
            return
        try:
            event = Event.FromString(record)
        except Exception:  # protobuf's, of which each version has its own
            return
        yield event.step, event.wall_time
        at += 16 + length


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_rows(workdir: pathlib.Path) -> list[Row]:
    """The rows of ``metrics.jsonl``; a last line that a crash cut off is left out.

    Raises:
      UserError: it cannot be read, or a line is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    with refused_by_system(f"cannot read {path}"):
        *lines, last = path.read_bytes().split(b"\n")
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]
    with contextlib.suppress(UserError):  # a whole row ends with its line
        rows.append(_row(last, "the last line"))
    return rows


def _row(line: bytes, name: str) -> Row:
    row = check_kinds(parse_object(line, name), {"step": int}, name)
    numbers = {key: float if key in _ACCURACIES else NUMBER_OR_NULL for key in row if key != "step"}
    return check_kinds(row, numbers, name)


def evaluations(workdir: pathlib.Path) -> list[Row]:
    """The rows of the evaluations, in order."""
    return [row for row in read_rows(workdir) if row.keys() & _ACCURACIES]


def chooses(row: Row) -> float:
    """The accuracy of an evaluation that decides which checkpoint is the best.

    That on the images held out (``config.data.holdout``); without them, as in the paper, that
    on the test images.
    """
    return row["holdout_accuracy" if "holdout_accuracy" in row else "test_accuracy"]


def accuracies(workdir: pathlib.Path) -> dict[int, float]:
    """By step, the accuracy that decides which checkpoint is the best."""
    return {row["step"]: chooses(row) for row in evaluations(workdir)}


def plot_curves(workdir: pathlib.Path, title: str) -> pathlib.Path:
    """Draws loss, accuracy and learning rate over the epochs into ``curves.png``.

    With a last BN also the least loss that the batches of training allow.

    Args:
      workdir: the run's folder, with its ``metrics.jsonl``.
      title: of the picture.

    Returns:
      The path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    rows = read_rows(workdir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    least = ("train_loss_floor", "least of train")
    panels = (
        ("loss", (*((f"{split}_loss", split) for split in _SPLITS), least)),
        ("accuracy (%)", tuple((f"{split}_accuracy", split) for split in _SPLITS)),
        ("learning rate", (("learning_rate", None),)),
    )
    for axes, (label, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, legend in curves:
            points = [(r["epoch"], r[name]) for r in rows if r.get(name) is not None]
            if not points:
                continue
            epochs, values = zip(*points, strict=True)
            if "accuracy" in name:
                values = tuple(100 * value for value in values)
            is_evaluation = name.startswith(_SPLITS[1:])
            style = {"ls": ":", "color": "gray"} if name == least[0] else {}
            axes.plot(
                epochs, values, label=legend, marker="o" if is_evaluation else None, ms=3, **style
            )
            if name.startswith("test"):
                axes.annotate(
                    f"{values[-1]:.4g}",
                    (epochs[-1], values[-1]),
                    xytext=(0, 6),
                    textcoords="offset points",
                    horizontalalignment="right",
                )
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right" if label == "loss" else "lower right")
    path = workdir / "curves.png"
    figure.savefig(without_link(path), dpi=120)
    return path
