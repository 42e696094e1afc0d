"""Whether a run is still finite: one that is not stops before anything of it is kept."""

from __future__ import annotations

import contextlib
import math

import jax
import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.errors import NonFiniteError, RunError
from mimicnorm_jax.train.checkpoint import Checkpoints, kept_step
from mimicnorm_jax.train.state import TrainState


class FiniteCheck:
    """Looks at the metrics of every step, and at states that are to be kept.

    Args:
      config: of the run; it says whether bad steps are skipped, and how many.
      checkpoints: of the run, of which an error tells; by then they are closed.
    """

    def __init__(self, config: ConfigDict, checkpoints: Checkpoints):
        self._config = config
        self._checkpoints = checkpoints
        self._learning_rate = math.nan

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of a step.

        Raises:
          NonFiniteError: its loss or gradient is infinite or NaN, or too many were skipped.
        """
        self._learning_rate = values["learning_rate"]
        if self._config.on_nonfinite == "skip":
            if values["skipped"] > self._config.skip_limit:
                what = f"{values['skipped']} steps were skipped (config.skip_limit); the last"
                raise self._diverged(f"{what} is not finite", step)
            return
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise self._diverged(f"the {name.replace('_', ' ')} is {values[name]}", step)

    def state(self, step: int, state: TrainState) -> None:
        """Takes the state after a step, on the host.

        A finite loss does not vouch for it: the loss is that of the state before the step.

        Raises:
          NonFiniteError: a parameter or statistic is infinite or NaN.
        """
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
            raise self._diverged("a parameter or statistic is infinite or NaN", step)

    def _diverged(self, what: str, step: int) -> NonFiniteError:
        with contextlib.suppress(RunError):
            self._checkpoints.close()  # what is being saved is kept too
        at = f"step {step} (learning rate {self._learning_rate:.3g})"
        return NonFiniteError(
            f"{what} at {at}; try, in a new --workdir, a lower config.learning_rate, more "
            "config.schedule.warmup_epochs or config.optimizer.clip_norm=1; "
            + kept_step(self._checkpoints.directory)
        )
