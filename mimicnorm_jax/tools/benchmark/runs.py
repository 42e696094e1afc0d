"""What it costs to start a run, and to save it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import jax

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.state import TrainState, host_copy

FIRST_STEP = "compiled and ran the first step"


def time_startup(arguments: Sequence[str], workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Starts the training program; returns the seconds until its first step is done.

    Args:
      arguments: ``--config`` and its fields.
      workdir: does not exist yet.
      cache: of compiled programs.

    Raises:
      UserError: the program failed.
    """
    command = [
        *(sys.executable, "-m", "mimicnorm_jax.main", *arguments, f"--workdir={workdir}"),
        f"--config.compilation_cache={cache}",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith(FIRST_STEP):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    raise UserError(f"the training program failed: {lines[-1] if lines else 'it said nothing'}")


@dataclasses.dataclass(frozen=True)
class CheckpointCost:
    """What a checkpoint an epoch costs.

    Attributes:
      blocked_s: seconds that the loop waits for it; median.
      extra_s: seconds that steps with a checkpoint take more than as many without; median of pairs.
      extra_quartiles_s: quartiles of these.
      epoch_s: seconds of an epoch without one.
      share: the larger of ``blocked_s`` and ``extra_s`` as a part of ``epoch_s``.
    """

    blocked_s: float
    extra_s: float
    extra_quartiles_s: tuple[float, float]
    epoch_s: float
    share: float


class _Segments:
    """Trains some steps at a time, as a run does, with or without a checkpoint."""

    def __init__(self, experiment: Experiment, folder: pathlib.Path, steps: int):
        self._experiment = experiment
        self._steps = steps
        self._checkpoints = Checkpoints(folder, keep=2)
        self._state: TrainState = experiment.initial_state()
        self._batches = experiment.batches(0, 2**31)
        self.train()  # compiles

    def train(self, *, save: bool = False) -> tuple[float, float]:
        """Seconds of a segment, and of these what saving at its beginning blocked."""
        began, blocked = time.perf_counter(), 0.0
        if save:
            self._checkpoints.save(host_copy(self._state), {}, best_step=0)
            blocked = time.perf_counter() - began
        for batch in itertools.islice(self._batches, self._steps):
            self._state, metrics = self._experiment.train_step(self._state, batch)
            jax.block_until_ready(metrics)
        return time.perf_counter() - began, blocked

    def close(self) -> None:
        self._checkpoints.close()
        self._batches.close()


def checkpoint_cost(
    experiment: Experiment, folder: pathlib.Path, *, pairs: int, steps: int
) -> CheckpointCost:
    """Trains segments with and without a checkpoint in turn, and compares neighbours.

    Args:
      experiment: what is trained.
      folder: for the checkpoints.
      pairs: of segments, at least 2; the first save, which opens the folder, does not count.
      steps: of a segment, enough that the checkpoint is written within it.
    """
    segments = _Segments(experiment, folder, steps)
    try:
        segments.train(save=True)
        plain, extra, blocked = [], [], []
        for pair in progress_bar(range(pairs), "pairs"):
            order = (False, True) if pair % 2 else (True, False)
            times = {save: segments.train(save=save) for save in order}
            plain.append(times[False][0])
            extra.append(times[True][0] - times[False][0])
            blocked.append(times[True][1])
    finally:
        segments.close()
    epoch = float(experiment.train_data.steps(1)) * statistics.median(plain) / steps
    low, middle, high = statistics.quantiles(extra, n=4)
    waits = statistics.median(blocked)
    return CheckpointCost(waits, middle, (low, high), epoch, max(waits, middle) / epoch)
