"""Evaluation over a whole split, with running or with exact last-BN statistics."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.data.pipeline import Pipeline, prefetch
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import coordination, replicate, shard_batch
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.program import Program
from mimicnorm_jax.train.scores import Outputs
from mimicnorm_jax.train.state import TrainState

OnBatch = Callable[[], None]


def _no_action() -> None:
    pass


def _batches(
    program: Program, split: Pipeline, description: str, on_batch: OnBatch
) -> Generator[Any]:
    """The whole split in order, on the devices, with its progress on a terminal."""
    ahead = prefetch(split.evaluation_batches(), lambda batch: shard_batch(batch, program.mesh))
    with contextlib.closing(ahead):
        for batch in progress_bar(
            ahead,
            description,
            math.ceil(split.steps(1)),
            leave=False,
            shown=coordination.is_first(),
        ):
            yield batch
            on_batch()


def evaluate(
    experiment: Experiment, state: TrainState, on_batch: OnBatch = _no_action
) -> dict[str, float]:
    """Loss and accuracy over the whole test split, every example once; and over the holdout.

    Args:
      experiment: whose network and data.
      state: on its devices; where the run averages its parameters, see ``averaged``.
      on_batch: called after each batch; may raise to end the evaluation.

    Returns:
      ``test_loss``, ``test_accuracy`` (in [0, 1]) and ``test_examples``; where images are held
      out, also ``holdout_loss`` and so on.
    """
    state = averaged(experiment, state, on_batch)
    found: dict[str, float] = {}
    splits = {"test": experiment.test_data, "holdout": experiment.holdout_data}
    for split_name, split in splits.items():
        if split is None:
            continue
        sums = collections.Counter[str]()
        with contextlib.closing(_batches(experiment, split, "evaluating", on_batch)) as batches:
            for batch in batches:
                metrics = experiment.eval_step(state.params, state.batch_stats, batch)
                sums.update({name: value.item() for name, value in metrics.items()})
        found |= {
            f"{split_name}_loss": sums["loss"] / sums["count"],
            f"{split_name}_accuracy": sums["correct"] / sums["count"],
            f"{split_name}_examples": sums["count"],
        }
    return found


def outputs_of(
    program: Program,
    state: TrainState,
    split: Pipeline,
    on_batch: OnBatch = _no_action,
    *,
    description: str = "evaluating",
) -> Outputs:
    """The logits of every example of a split, on the host, in every process.

    Args:
      program: whose network.
      state: on its devices; where the run averages its parameters and has batch statistics, from
        ``averaged``.
      split: its images.
      on_batch: called after each batch; may raise to end the evaluation.
      description: shown beside the progress.
    """
    logits, labels = [], []
    with contextlib.closing(_batches(program, split, description, on_batch)) as batches:
        for batch in batches:
            step = program.logits_step(state.evaluated_params, state.batch_stats, batch)
            found = jax.device_get(step)
            real = found["mask"] > 0
            logits.append(found["logits"][real])
            labels.append(found["label"][real])
    return Outputs(np.concatenate(logits), np.concatenate(labels))


def averaged(
    experiment: Experiment, state: TrainState, on_batch: OnBatch = _no_action
) -> TrainState:
    """The averaged parameters in place of the last ones, with statistics of their own.

    Running statistics are those of the parameters that are trained: with them averaged ones may
    be no better than chance. So they are estimated: the means, over ``optimizer.ema_batches``
    batches of training, of what the norms would keep of each, with the averaged parameters and
    without dropout. The batches are those that come after ``state.step``, as training will see
    them: the same whenever, and on however many devices, that state is evaluated.

    Arguments as for ``evaluate``.

    Returns:
      The state to be evaluated (not to train on), without averages; where the run averages
      nothing, the state as it is.
    """
    if state.ema_params is None:
        return state
    mesh, params, running = experiment.mesh, state.ema_params, state.batch_stats
    total = replicate(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), running), mesh)
    if jax.tree.leaves(total):
        first = int(state.step)
        last = first + experiment.config.optimizer.ema_batches
        # beside those of training, whose worker processes keep running
        ahead = experiment.batches(first, last, in_processes=False)
        with contextlib.closing(ahead) as batches:
            for step, batch in enumerate(batches, start=first):
                number, before = replicate(np.array(step, np.int32), mesh), total
                total = experiment.statistics_step(params, running, batch, number, total)
                jax.block_until_ready(before)  # no more than two batches are on their way
                on_batch()
    return dataclasses.replace(state, params=params, batch_stats=total, ema_params=None)


def recalibrate(
    experiment: Experiment, state: TrainState, on_batch: OnBatch = _no_action
) -> TrainState:
    """Replaces the last BN's running statistics by those of the whole training split.

    One forward pass in evaluation mode over the training images as they are stored. The
    running statistics average logits of augmented images over parameters that were still
    moving; these are exact. Arguments as for ``evaluate``.

    Returns:
      The state with other batch statistics, to be evaluated (not to train on).

    Raises:
      UserError: the network has no last BN.
    """
    network = experiment.network
    if network.last_bn is None:
        raise UserError(
            f"method {experiment.config.method!r} has no last BN whose statistics could be "
            "recalibrated"
        )
    state = averaged(experiment, state, on_batch)
    count, first, second = 0, np.zeros(()), np.zeros(())
    batches = _batches(experiment, experiment.train_data, "recalibrating", on_batch)
    with contextlib.closing(batches):
        for batch in batches:
            moments = jax.device_get(
                experiment.moments_step(state.params, state.batch_stats, batch)
            )
            count += int(moments["count"])
            first = first + moments["first"].astype(np.float64)
            second = second + moments["second"].astype(np.float64)
    batch_stats = jax.tree.map(jnp.copy, state.batch_stats)
    statistics = network.last_bn_statistics(batch_stats)
    exact: dict[str, np.ndarray] = {
        "mean": np.asarray(statistics["mean"]) + first / count,
        "var": (second - first**2 / count) / (count - 1),  # unbiased, as the running one
    }
    for name, value in exact.items():
        statistics[name] = replicate(value.astype(statistics[name].dtype), experiment.mesh)
    return dataclasses.replace(state, batch_stats=batch_stats)
