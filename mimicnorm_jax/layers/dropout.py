"""Dropout whose mask depends on the example, not on where the example is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Dropout(nnx.Module):
    """Inverted dropout with one key an example and no state of its own.

    ``nnx.Dropout`` draws one mask for the local batch from a counter that it carries, so
    the mask changes with the number of devices and with what ran before. Here it is a
    function of the key that comes with each example.

    Args:
      rate: probability that a value is zeroed, in [0, 1).
      index: tells the dropout layers of one network apart.
      deterministic: pass the input through; ``model.eval()``, ``model.train()`` and
        ``nnx.view`` set it.
    """

    def __init__(self, rate: float, *, index: int = 0, deterministic: bool = False):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate
        self.index = index
        self.deterministic = deterministic

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``nnx.view(model, deterministic=...)`` calls."""
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops values of ``(B, ...)`` inputs.

        Args:
          x: the input.
          keys: ``(B,)`` PRNG keys, one an example; unused in evaluation.

        Raises:
          ValueError: no keys in training.
        """
        if self.deterministic or self.rate == 0.0:
            return x
        if keys is None:
            raise ValueError("dropout in training needs keys=(B,) PRNG keys, one an example")

        def drop(example: jax.Array, key: jax.Array) -> jax.Array:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, self.index), 1.0 - self.rate, example.shape
            )
            return jnp.where(keep, example / (1.0 - self.rate), jnp.zeros((), example.dtype))

        return jax.vmap(drop)(x, keys)
