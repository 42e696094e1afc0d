"""Evaluation over a whole split, with running or with exact last-BN statistics."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mimicnorm_jax.data.pipeline import Pipeline, prefetch
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import coordination, replicate, shard_batch
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.description import check_network
from mimicnorm_jax.train.metrics import accuracies
from mimicnorm_jax.train.setup import Experiment, set_up_together
from mimicnorm_jax.train.state import TrainState
from mimicnorm_jax.train.workdir import check_data, check_workdir, write_json

OnBatch = Callable[[], None]


def _no_action() -> None:
    pass


def _batches(
    experiment: Experiment, split: Pipeline, description: str, on_batch: OnBatch
) -> Generator[Any]:
    """The whole split in order, on the devices, with its progress on a terminal."""
    ahead = prefetch(split.evaluation_batches(), lambda batch: shard_batch(batch, experiment.mesh))
    shown = sys.stderr.isatty() and coordination.is_first()
    with contextlib.closing(ahead):
        for batch in tqdm(
            ahead, description, math.ceil(split.steps(1)), leave=False, disable=not shown
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


def evaluate_run(
    config: ConfigDict, workdir: pathlib.Path, *, exact: bool = False
) -> dict[str, Any]:
    """Evaluates the latest and the best checkpoint of a run on the test split.

    The run may be going on: nothing of it is changed.

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

    def check() -> None:
        if not directory.is_dir():
            raise UserError(f"--workdir={workdir} has no checkpoints to evaluate; train it first")
        check_workdir(workdir, config, writes=False)
        check_network(workdir, config)

    coordination.together("workdir", check)
    experiment = set_up_together(config)
    coordination.together("data", lambda: check_data(workdir, experiment.data_identity))
    checkpoints = Checkpoints(directory)
    best = checkpoints.restore_best(experiment.abstract_state, accuracies(workdir))
    latest = checkpoints.restore_latest(experiment.abstract_state, set_aside=False)
    states = {
        name: replicate(restored.state, experiment.mesh)
        for name, restored in (("best", best), ("latest", latest))
        if restored is not None
    }
    if exact:
        states |= {f"{name}_recalibrated": recalibrate(experiment, s) for name, s in states.items()}
    results = {
        name: {"step": int(state.step)} | evaluate(experiment, state)
        for name, state in states.items()
    }
    if coordination.is_first():
        write_json(workdir / "eval.json", results)
    return results
