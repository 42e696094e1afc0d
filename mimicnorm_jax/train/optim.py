"""SGD and the learning-rate schedules, from the configuration to optax."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mimicnorm_jax.config import rate
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import WeightMeanMask, project_weight_mean

Tree = Any


def make_schedule(
    config: ConfigDict, steps: Callable[[float], Fraction], total_steps: int
) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then the configured schedule.

    Args:
      config: ``learning_rate`` and ``schedule`` are read.
      steps: how many steps so many epochs are, see ``Pipeline.steps``.
      total_steps: where cosine and linear decay reach 0. ``max_steps`` does not move it.
    """
    schedule = config.schedule
    peak = config.learning_rate
    warmup = round(steps(schedule.warmup_epochs))
    if schedule.name == "multistep":
        # optax counts the boundaries of a joined schedule from the end of the warm-up.
        factors: dict[int, float] = {}
        for epoch in schedule.milestones:
            step = max(0, round(steps(epoch)) - warmup)
            factors[step] = factors.get(step, 1.0) * schedule.gamma  # several may share a step
        after = optax.piecewise_constant_schedule(peak, factors)
    elif schedule.name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup))
    elif schedule.name == "linear":
        after = optax.linear_schedule(peak, 0.0, max(1, total_steps - warmup))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def parameter_name(path: tuple[Any, ...]) -> str:
    """``blocks/0/conv/kernel`` for the path of a leaf in the parameter tree."""
    return "/".join(str(entry.key) for entry in path)


def rate_factors(rates: Sequence[str], params: Tree) -> Tree:
    """Each parameter's learning rate as a multiple of the schedule's: a tree of numbers.

    Args:
      rates: ``PATTERN=FACTOR``, see ``config.optimizer.rates``.
      params: tree of (abstract) parameters.

    Raises:
      UserError: a pattern matches no parameter.
    """
    patterns = [rate(text) for text in rates]
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [parameter_name(path) for path, _ in paths]
    for pattern, _ in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"config.optimizer.rates: {pattern!r} matches no parameter; they are named like "
                f"{names[0]} and {names[-1]}"
            )

    def factor_of(path: tuple[Any, ...], _: Any) -> float:
        name = parameter_name(path)
        return next((factor for pattern, factor in patterns if re.search(pattern, name)), 1.0)

    return jax.tree_util.tree_map_with_path(factor_of, params)


def _scale_each(factors: Tree) -> optax.GradientTransformation:
    def scaled(factor: float, update: jax.Array) -> jax.Array:
        return update if factor == 1 else jnp.zeros_like(update) if not factor else factor * update

    return optax.stateless(lambda updates, _: jax.tree.map(scaled, factors, updates))


def decay_mask(pattern: str, params: Tree) -> Tree:
    """Which parameters decay: those whose name has a match of ``pattern``.

    Raises:
      UserError: no parameter matches.
    """
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(pattern, parameter_name(path)) is not None, params
    )
    if not any(jax.tree.leaves(chosen)):
        names = [parameter_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise UserError(
            f"config.optimizer.weight_decay_mask = {pattern!r} matches no parameter; they are "
            f"named like {names[0]} and {names[-1]}"
        )
    return chosen


def make_optimizer(
    config: ConfigDict,
    schedule: optax.Schedule,
    params: Tree,
    weight_mean_mask: WeightMeanMask,
    *,
    scalar_rate: float = 1.0,
) -> optax.GradientTransformation:
    """SGD as the paper trains: decay joins the gradient, then momentum, then the rate.

    Args:
      config: ``optimizer`` is read.
      schedule: learning rate by step.
      params: tree of (abstract) parameters, for the masks.
      weight_mean_mask: kernels that are kept centred after every update.
      scalar_rate: see ``Method``.
    """
    options = config.optimizer
    transforms = []
    if options.clip_norm is not None:
        transforms.append(optax.clip_by_global_norm(options.clip_norm))
    if options.weight_decay:
        mask = decay_mask(options.weight_decay_mask, params)
        transforms.append(optax.add_decayed_weights(options.weight_decay, mask))
    if options.momentum:
        transforms.append(optax.trace(options.momentum, nesterov=options.nesterov))
    transforms.append(optax.scale_by_learning_rate(schedule))
    if scalar_rate != 1.0:
        scalars = jax.tree.map(lambda leaf: leaf.ndim == 0, params)
        transforms.append(optax.masked(optax.scale(scalar_rate), scalars))
    if options.rates:
        transforms.append(_scale_each(rate_factors(options.rates, params)))
    if weight_mean_mask:
        transforms.append(project_weight_mean(weight_mean_mask))
    return optax.chain(*transforms)
