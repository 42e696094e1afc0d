"""BatchNorm for the baseline: one pass over its input, and stable."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mimicnorm_jax.layers.last_bn import update_average
from mimicnorm_jax.layers.weight_mean import at_least_float32


class ShiftedBatchNorm(nnx.Module):
    """BatchNorm of the last axis (Ioffe and Szegedy 2015).

    Parameters and statistics have the names that they have in ``nnx.BatchNorm``, from which it
    differs in two things:

    - The variance is ``E[(x - r)^2] - E[x - r]^2`` with r the running mean: like
      ``E[x^2] - E[x]^2`` it needs one pass over the input, and unlike that it does not cancel
      where the mean is large against the deviation, once r is near the mean. (It starts at 0.)
    - The running variance is that of the unbiased one, as PyTorch and ``LastBN`` keep it.

    Statistics and normalization are computed in at least float32.

    Args:
      num_features: C, the size of the last axis.
      momentum: weight of the old running average at each step.
      epsilon: added to the variance.
      dtype: type of the output; None: that of the input.
      param_dtype: type of the parameters and, if it is wider than float32, of the statistics.
      axis_name: mapped axis over whose members the statistics are averaged.
      rngs: the ``params`` stream is used.

    Attributes:
      scale, bias: of the output, ``(C,)``.
      mean, var: the running averages ``(C,)``.
      use_running_average: ``model.eval()`` and ``model.train()`` set it.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        # A key each, as in Flax: so the layers that follow start as they do there.
        ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
        self.scale = nnx.Param(ones(rngs.params(), (num_features,), param_dtype))
        self.bias = nnx.Param(zeros(rngs.params(), (num_features,), param_dtype))
        wide = at_least_float32(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), wide))
        self.var = nnx.BatchStat(jnp.ones((num_features,), wide))
        self.use_running_average = False
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.axis_name = axis_name

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``(..., C)``, in training by all axes but the last."""
        wide = at_least_float32(x.dtype)
        running = self.mean[...].astype(wide)
        shifted = x.astype(wide) - _channels(running, x.ndim)
        if self.use_running_average:
            var = self.var[...].astype(wide)
        else:
            offset, var, count = self._moments(shifted)
            unbiased = var * (count / max(count - 1, 1))
            update_average(self.mean, running + offset, self.momentum)
            update_average(self.var, unbiased, self.momentum)
            shifted = shifted - _channels(offset, x.ndim)
        factor = lax.rsqrt(var + self.epsilon) * self.scale[...].astype(wide)
        y = shifted * _channels(factor, x.ndim) + _channels(self.bias[...].astype(wide), x.ndim)
        return y.astype(x.dtype if self.dtype is None else self.dtype)

    def _moments(self, shifted: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean (C,), biased variance (C,), and number of values of each channel."""
        axes = tuple(range(shifted.ndim - 1))
        count = math.prod(shifted.shape[:-1])
        first, second = shifted.mean(axes), jnp.square(shifted).mean(axes)
        if self.axis_name is not None:
            count *= lax.axis_size(self.axis_name)
            first, second = lax.pmean((first, second), self.axis_name)
        return first, jnp.maximum(second - jnp.square(first), 0.0), count


def _channels(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape((1,) * (ndim - 1) + (-1,))
