"""BatchNorm for the baseline: one pass over its input, and stable."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mimicnorm_jax.layers.convolution import Differentiable
from mimicnorm_jax.layers.kernel import at_least_float32
from mimicnorm_jax.layers.last_bn import update_average
from mimicnorm_jax.layers.varying import as_varying, axes_of


class ShiftedBatchNorm(nnx.Module):
    """BatchNorm of the last axis (Ioffe and Szegedy 2015).

    Parameters and statistics have the names that they have in ``nnx.BatchNorm``, from which it
    differs in two things:

    - The variance is ``E[(x - r)^2] - E[x - r]^2`` with r the running mean: like
      ``E[x^2] - E[x]^2`` it needs one pass over the input, and unlike that it does not cancel
      where the mean is large against the deviation, once r is near the mean. (It starts at 0.)
    - The running variance is that of the unbiased one, as PyTorch and ``LastBN`` keep it.

    Statistics and normalization are computed in at least float32. What is kept for the backward
    pass is the input, in its own type. The output is differentiable in reverse mode, with
    ``differentiable="twice"`` in any; the running statistics are constants to it.

    Args:
      num_features: C, the size of the last axis.
      momentum: weight of the old running average at each step.
      epsilon: added to the variance.
      dtype: type of the output; None: that of the input.
      param_dtype: type of the parameters and, if it is wider than float32, of the statistics.
      axis_name: mapped axis over whose members the statistics are averaged.
      frozen: always normalize by the running averages, and train nothing: all four arrays are
        ``nnx.BatchStat``, and nothing is kept for the backward pass.
      rngs: the ``params`` stream is used.

    Attributes:
      scale, bias: of the output, ``(C,)``.
      mean, var: the running averages ``(C,)``.
      use_running_average: ``model.eval()`` and ``model.train()`` set it.
      differentiable: ``"once"``, see ``mimicnorm_jax.twice_differentiable``.
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
        frozen: bool = False,
        rngs: nnx.Rngs,
    ):
        # A key each, as in Flax: so the layers that follow start as they do there.
        ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
        kind = nnx.BatchStat if frozen else nnx.Param
        self.scale = kind(ones(rngs.params(), (num_features,), param_dtype))
        self.bias = kind(zeros(rngs.params(), (num_features,), param_dtype))
        wide = at_least_float32(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), wide))
        self.var = nnx.BatchStat(jnp.ones((num_features,), wide))
        self.use_running_average = False
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.axis_name = axis_name
        self.frozen = frozen
        self.differentiable: Differentiable = "once"

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view(model, use_running_average=...)`` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``(..., C)``, in training by all axes but the last."""
        wide = at_least_float32(x.dtype)
        dtype = x.dtype if self.dtype is None else jnp.dtype(self.dtype)
        mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
        scale, bias = self.scale[...].astype(wide), self.bias[...].astype(wide)
        if self.use_running_average or self.frozen:
            shifted = x.astype(wide) - _channels(mean, x.ndim)
            factor = lax.rsqrt(var + self.epsilon) * scale
            return (shifted * _channels(factor, x.ndim) + _channels(bias, x.ndim)).astype(dtype)
        # Inside a shard_map each device has its own gradient of what all share.
        given = as_varying((x, scale, bias, mean), axes_of(x))
        normalized = _normalize if self.differentiable == "once" else _normalized
        y, offset, var = normalized(*given, self.epsilon, self.axis_name, dtype)
        count = _count(x, self.axis_name)
        update_average(self.mean, mean + offset, self.momentum)
        update_average(self.var, var * (count / max(count - 1, 1)), self.momentum)
        return y


class _Kept(NamedTuple):
    """For the backward pass: the input ``(..., C)``; the others are ``(C,)``."""

    x: jax.Array
    scale: jax.Array
    mean: jax.Array
    inverse: jax.Array  # of the deviation


# Left to itself, JAX keeps more than the input: a step of ResNet-18 on an H100 has 722 MiB for 689.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shift: jax.Array,
    epsilon: float,
    axis_name: str | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output, the mean less ``shift``, and the biased variance."""
    return _normalized(x, scale, bias, shift, epsilon, axis_name, dtype)


def _normalized(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(*args)[0]


def _forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shift: jax.Array,
    epsilon: float,
    axis_name: str | None,
    dtype: jnp.dtype,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Kept]:
    shifted = x.astype(shift.dtype) - _channels(shift, x.ndim)
    axes = tuple(range(x.ndim - 1))
    offset, second = shifted.mean(axes), jnp.square(shifted).mean(axes)
    if axis_name is not None:
        offset, second = lax.pmean((offset, second), axis_name)
    var = jnp.maximum(second - jnp.square(offset), 0.0)
    kept = _Kept(x, scale, shift + offset, lax.rsqrt(var + epsilon))
    # From the input, as the backward pass does it: with ``shifted``, which is a little more exact,
    # XLA keeps more for the backward pass of a GPU.
    factor, centred = kept.inverse * scale, x.astype(shift.dtype) - _channels(kept.mean, x.ndim)
    y = centred * _channels(factor, x.ndim) + _channels(bias, x.ndim)
    return (y.astype(dtype), offset, var), kept


def _backward(
    epsilon: float,
    axis_name: str | None,
    dtype: jnp.dtype,
    kept: _Kept,
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """With z the normalized input: ``dx = scale / deviation * (dy - mean(dy) - z mean(z dy))``."""
    del epsilon, dtype
    x = kept.x
    wide = kept.mean.dtype
    dy = cotangents[0].astype(wide)
    z = (x.astype(wide) - _channels(kept.mean, x.ndim)) * _channels(kept.inverse, x.ndim)
    axes = tuple(range(x.ndim - 1))
    dbias, dscale = dy.sum(axes), (dy * z).sum(axes)
    sums = (dbias, dscale) if axis_name is None else lax.psum((dbias, dscale), axis_name)
    of_dy, of_product = (_channels(total / _count(x, axis_name), x.ndim) for total in sums)
    dx = (dy - of_dy - z * of_product) * _channels(kept.inverse * kept.scale, x.ndim)
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(kept.mean)


_normalize.defvjp(_forward, _backward)


def _count(x: jax.Array, axis_name: str | None) -> int:
    """Number of values of each channel, over all devices."""
    return math.prod(x.shape[:-1]) * (1 if axis_name is None else lax.axis_size(axis_name))


def _channels(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape((1,) * (ndim - 1) + (-1,))
