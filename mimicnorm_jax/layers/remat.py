"""Rematerialization: memory against work, block by block of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from flax import nnx

Remat = Literal["none", "block", "dots_saveable"]
REMATS: tuple[str, ...] = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Runner:
    """``run`` with a fixed ``remat``: a part of a network's static structure."""

    remat: Remat

    def __call__(self, block: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """``block(x)``."""
        return run(block, x, self.remat)


def run(block: Callable[[jax.Array], jax.Array], x: jax.Array, remat: str) -> jax.Array:
    """``block(x)``, of which the backward pass computes again what ``remat`` says.

    Args:
      block: a module; its batch statistics are updated once, as without rematerialization.
      x: ``(B, H, W, C)``.
      remat: ``"none"``: nothing; ``"block"``: everything, so that only ``x`` is kept;
        ``"dots_saveable"``: all but convolutions and matrix products, whose outputs are kept
        (``jax.checkpoint_policies.dots_saveable``).
    """
    if remat == "none" or not isinstance(block, nnx.Module):
        return block(x)
    graph, state = nnx.split(block)
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots_saveable" else None

    def apply(state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        module = nnx.merge(graph, state)
        y = module(x)
        return y, nnx.state(module, nnx.BatchStat)

    y, statistics = jax.checkpoint(apply, policy=policy)(state, x)
    nnx.update(block, statistics)
    return y
