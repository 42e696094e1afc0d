"""Checkpoints: asynchronous, never half there, a damaged one skipped for the one before."""

from __future__ import annotations

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
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(self._keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(
        self, state: TrainState, progress: dict[str, Any], test_accuracy: float | None
    ) -> None:
        """Starts to save; returns when the state may be overwritten.

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
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
            metrics=None if test_accuracy is None else {_METRIC: test_accuracy},
        )

    def restore_latest(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None.

        A damaged one is reported and moved to ``damaged/`` beside the checkpoints.

        Args:
          target: shapes, types and shardings to restore to.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, target)
            except Exception as error:  # whatever a damaged file makes a decoder raise
                self._set_aside(step, error)
        return None

    def restore_best(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The checkpoint of the best test accuracy, else the latest.

        Raises:
          UserError: there is none.
        """
        metrics = {step: self._manager.metrics(step) for step in sorted(self._manager.all_steps())}
        if not metrics:
            raise UserError(f"{self.directory} has no checkpoint")
        evaluated = {step: m[_METRIC] for step, m in metrics.items() if m}
        best = max(evaluated, key=lambda step: (evaluated[step], step)) if evaluated else None
        return self._restore(max(metrics) if best is None else best, target)

    def _restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.progress

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.directory.parent / "damaged" / str(step)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"WARNING: the checkpoint of step {step} is damaged ({reason}); it is moved to "
            f"{aside} and the one before it is used",
            file=sys.stderr,
        )
        self._manager.close()
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        (self.directory / str(step)).rename(aside)
        self._manager = self._open()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
