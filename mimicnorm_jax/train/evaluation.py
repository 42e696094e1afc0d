"""Evaluation over a whole split, with running or with exact last-BN statistics."""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mimicnorm_jax.data.pipeline import Pipeline, prefetch
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.setup import Experiment
from mimicnorm_jax.train.state import TrainState


def _batches(experiment: Experiment, split: Pipeline, description: str) -> Iterator[Any]:
    """The whole split in order, on the devices, with its progress on a terminal."""
    yield from tqdm(
        prefetch(split.evaluation_batches(), lambda batch: shard_batch(batch, experiment.mesh)),
        description,
        math.ceil(split.steps(1)),
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def evaluate(experiment: Experiment, state: TrainState) -> dict[str, float]:
    """Loss and accuracy over the whole test split, every example once.

    Uses the averaged parameters where the run keeps them.

    Returns:
      ``test_loss``, ``test_accuracy`` (in [0, 1]) and ``test_examples``.
    """
    sums = collections.Counter[str]()
    for batch in _batches(experiment, experiment.test_data, "evaluating"):
        metrics = experiment.eval_step(state.evaluated_params, state.batch_stats, batch)
        sums.update({name: value.item() for name, value in metrics.items()})
    return {
        "test_loss": sums["loss"] / sums["count"],
        "test_accuracy": sums["correct"] / sums["count"],
        "test_examples": sums["count"],
    }


def recalibrate(experiment: Experiment, state: TrainState) -> TrainState:
    """Replaces the last BN's running statistics by those of the whole training split.

    One forward pass in evaluation mode over the training images as they are stored. The
    running statistics average logits of augmented images over parameters that were still
    moving; these are exact.

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
    count, first, second = 0, np.zeros(()), np.zeros(())
    for batch in _batches(experiment, experiment.train_data, "recalibrating"):
        moments = jax.device_get(
            experiment.moments_step(state.evaluated_params, state.batch_stats, batch)
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
        old = statistics[name]
        statistics[name] = jax.device_put(value.astype(old.dtype), old.sharding)
    return dataclasses.replace(state, batch_stats=batch_stats)
