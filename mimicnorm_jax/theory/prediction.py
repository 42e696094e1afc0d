"""What each part of a network makes of a signal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import LastBN, ScaledConv, ScaledDense
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.layers.relu import Relu, relu
from mimicnorm_jax.layers.scaled import ScaledKernel
from mimicnorm_jax.methods.base import Upcast, add, identity
from mimicnorm_jax.methods.fixup import FixupConv, FixupDense
from mimicnorm_jax.models import channels
from mimicnorm_jax.models import pooling as model_pooling
from mimicnorm_jax.theory import normalization, pooling, signal
from mimicnorm_jax.theory.signal import Signal

# What networks call themselves; the rest they ask of their method.
_OF_SIGNALS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (model_pooling.max_pool, pooling.max_pool),
    (model_pooling.max_pool_activated, pooling.max_pool_activated),
    (model_pooling.global_average_pool, pooling.global_average_pool),
    (channels.flatten, pooling.flatten),
    (channels.concatenate, signal.concatenate),
    (channels.interleave, signal.concatenate),
    (channels.halves, signal.halves),
    (channels.identity_shortcut, signal.identity_shortcut),
)
for _function, _version in _OF_SIGNALS:
    _function.register(Signal, _version)


@functools.singledispatch
def predict(part: Any, *signals: Signal) -> Signal:
    """What a part of a network makes of signals; a type of part registers its own.

    Raises:
      UserError: there is no theory of this part.
    """
    if part is identity:
        return signals[0]
    if part is add:
        return signal.add(*signals)
    if part in (relu, jax.nn.relu) or isinstance(part, Relu):
        return signal.relu(*signals)
    raise UserError(
        f"there is no prediction for {part!r}; register one with theory.prediction.predict"
    )


def _kernel(layer: nnx.Conv | nnx.Linear | ScaledKernel) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias that meet the input."""
    bias: jax.Array | None
    if isinstance(layer, ScaledKernel):
        kernel, bias = layer.effective_kernel(), layer.effective_bias()
    else:
        kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
    return kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype) if bias is None else bias


@predict.register(nnx.Conv)
@predict.register(ScaledConv)
def _(layer: nnx.Conv | ScaledConv, x: Signal) -> Signal:
    for option in ("input_dilation", "kernel_dilation"):
        if not {*np.ravel(getattr(layer, option) or 1)} == {1}:
            raise UserError(f"there is no prediction for a convolution with {option}")
    if isinstance(layer.padding, str):
        raise UserError(f"there is no prediction for padding={layer.padding!r}: give numbers")
    kernel, bias = _kernel(layer)
    strides: Any = layer.strides
    padding: Any = layer.padding
    stride = strides if isinstance(strides, int) else strides[0]
    low, high = padding if isinstance(padding, tuple) else (padding, padding)
    pads = tuple((s, s) if isinstance(s, int) else s for s in (low, high))
    return signal.convolve(x, kernel, bias, stride=stride, padding=pads)


@predict.register(nnx.Linear)
@predict.register(ScaledDense)
def _(layer: nnx.Linear | ScaledDense, x: Signal) -> Signal:
    kernel, bias = _kernel(layer)
    return signal.convolve(x, kernel[None, None], bias, stride=1, padding=((0, 0), (0, 0)))


@predict.register
def _(layer: FixupConv, x: Signal) -> Signal:
    if layer.bias_in is not None:
        x = signal.shift(x, layer.bias_in[...])
    y = predict(layer.conv, x)
    return y if layer.bias_out is None else signal.shift(y, layer.bias_out[...])


@predict.register
def _(layer: FixupDense, x: Signal) -> Signal:
    return predict(layer.dense, signal.shift(x, layer.bias_in[...]))


def _affine(norm: nnx.BatchNorm | ShiftedBatchNorm | nnx.GroupNorm) -> tuple[jax.Array, jax.Array]:
    scale = jnp.ones(1) if norm.scale is None else norm.scale[...]
    return scale, jnp.zeros(1) if norm.bias is None else norm.bias[...]


@predict.register(nnx.BatchNorm)
@predict.register(ShiftedBatchNorm)
def _(norm: nnx.BatchNorm | ShiftedBatchNorm, x: Signal) -> Signal:
    return normalization.batch_norm(x, *_affine(norm))


@predict.register
def _(norm: nnx.GroupNorm, x: Signal) -> Signal:
    return normalization.group_norm(x, *_affine(norm))


@predict.register(LastBN)
@predict.register(Upcast)
def _(head: LastBN | Upcast, x: Signal) -> Signal:
    return x  # nothing follows that is predicted
