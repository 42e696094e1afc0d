"""Checkpoints: asynchronous, never half there, a damaged one skipped for the one before."""

from __future__ import annotations

import copy
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.state import TrainState

_METRIC = "test_accuracy"
Restored = tuple[TrainState, dict[str, Any]]


def latest_step(directory: pathlib.Path) -> int:
    """Step of the newest checkpoint in a folder; 0 without one."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics.get(_METRIC, -1.0)  # a state that was not evaluated is never the best


class Checkpoints:
    """The checkpoints of one run: the latest few and the best.

    Args:
      directory: holds one folder a step.
      keep: number of latest checkpoints to keep; the one of the best test accuracy is
        kept beside them.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int):
        self.directory = directory
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        best = policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        policy = policies.AnyPreservationPolicy([policies.LatestN(self._keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # The policy decides what is kept; without this, no metric would reach the disk,
            # and a resumed run would not know which of its checkpoints is the best.
            best_fn=_accuracy,
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(
        self, state: TrainState, progress: dict[str, Any], test_accuracy: float | None
    ) -> None:
        """Starts to save; returns when the state and the progress may be overwritten.

        Args:
          state: the state.
          progress: what else the loop needs to go on, as JSON.
          test_accuracy: of this state, where it was evaluated.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # On CPU Orbax writes from the device buffers themselves, which the next
            # training step is about to reuse (they are donated).
            state = jax.tree.map(jnp.copy, state)
        # Orbax also writes the JSON later, from these objects, to which the loop goes on adding.
        progress = copy.deepcopy(progress)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
            metrics={} if test_accuracy is None else {_METRIC: test_accuracy},
        )

    def restore_latest(self, target: TrainState) -> Restored | None:
        """The newest checkpoint that can be read; None if there are no checkpoints.

        Damaged ones are reported and moved to ``damaged/`` beside the checkpoints, but
        only where an older one can take their place.

        Args:
          target: shapes, types and shardings to restore to.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        restored, damaged = self._first_readable(steps, target)
        if damaged:
            self._set_aside(damaged)
        return restored

    def restore_best(self, target: TrainState) -> Restored:
        """The checkpoint of the best test accuracy; if damaged, the next best, loudly.

        Raises:
          UserError: there is none, or none that can be read.
        """
        steps = sorted(self._manager.all_steps(), key=lambda step: (self._accuracy_of(step), step))
        if not steps:
            raise UserError(f"{self.directory} has no checkpoint")
        return self._first_readable(steps[::-1], target)[0]

    def _accuracy_of(self, step: int) -> float:
        try:
            return _accuracy(self._manager.metrics(step) or {})
        except Exception:  # whatever a damaged file makes a decoder raise
            return -1.0

    def _first_readable(self, steps: list[int], target: TrainState) -> tuple[Restored, list[int]]:
        """The first of ``steps`` that can be read, and those before it that cannot."""
        damaged: list[int] = []
        for step in steps:
            try:
                return self._restore(step, target), damaged
            except Exception as error:  # whatever a damaged file makes a decoder raise
                damaged.append(step)
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(
                    f"WARNING: the checkpoint of step {step} is damaged ({reason})", file=sys.stderr
                )
        raise UserError(
            f"none of the checkpoints in {self.directory} can be read; to start again, choose "
            "another --workdir"
        )

    def _restore(self, step: int, target: TrainState) -> Restored:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.progress

    def _set_aside(self, damaged: list[int]) -> None:
        aside = self.directory.parent / "damaged"
        print(f"WARNING: moved to {aside}; the checkpoint before it is used", file=sys.stderr)
        self._manager.close()
        aside.mkdir(exist_ok=True)
        for step in damaged:
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (self.directory / str(step)).rename(aside / str(step))
        self._manager = self._open()

    def latest_step(self) -> int:
        """Step of the newest checkpoint, one that is still being written included; or 0."""
        return self._manager.latest_step() or 0

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
