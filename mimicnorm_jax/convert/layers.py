"""What stands in a converted network where a BatchNorm was, and at its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.layers import LastBN
from mimicnorm_jax.layers.last_bn import normalize


def passed_on(x: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Returns ``x``: what is left of a BatchNorm that its layer has taken over."""
    return x


class Shift(nnx.Module):
    """``x + bias``, one number a channel: what is left of a BatchNorm that no layer can take over.

    It takes the arguments of ``nnx.BatchNorm``'s call, and needs none of them.

    Args:
      bias: ``(C,)``; in a stack of layers with its axes before it.
      axis: of the channels.
    """

    def __init__(self, bias: jax.Array, *, axis: int = -1):
        self.bias = nnx.Param(bias)
        self.axis = axis

    def __call__(self, x: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """Shifts ``(..., C)``."""
        return x + along(self.bias[...], self.axis, x)


class ScaleShift(nnx.Module):
    """``x * scale + bias``, one of each a channel: a BatchNorm of a trained network, made plain.

    Args:
      scale, bias: ``(C,)``; in a stack of layers with its axes before it.
      axis: of the channels.
    """

    def __init__(self, scale: jax.Array, bias: jax.Array, *, axis: int = -1):
        self.scale = nnx.Param(scale)
        self.bias = nnx.Param(bias)
        self.axis = axis

    def __call__(self, x: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """Maps ``(..., C)`` to the same shape."""
        return x * along(self.scale[...], self.axis, x) + along(self.bias[...], self.axis, x)


class Scaled(nnx.Module):
    """A module whose output is multiplied by a learnable scalar: the end of a residual branch.

    Where a branch ends in a layer the scalar is folded into that. Here it cannot be, and the
    backward pass keeps the module's output for it.

    Args:
      module: the end of the branch.
      scale: initial value.
    """

    def __init__(self, module: nnx.Module, scale: jax.Array):
        self.module = module
        self.scale = nnx.Param(scale)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """``scale * module(...)``."""
        y = self.module(*args, **kwargs)  # type: ignore[operator]
        return y * self.scale[...].astype(y.dtype)


class ForeignLayer(nnx.Module):
    """A layer of Linen that NNX or this package does not have: Linen's own code computes it.

    Args:
      kind_name: the name of its class.
      variables: its parameters, by name.
    """

    def __init__(self, kind_name: str, variables: Mapping[str, jax.Array]):
        self.kind_name = kind_name
        for name in {"bias", *variables}:
            setattr(self, name, nnx.Param(variables[name]) if name in variables else None)

    def __call__(self, x: jax.Array, proceed: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """``proceed(x)``."""
        return proceed(x)


class NormalizedLogits(nnx.Module):
    """The layer that makes the logits, and the last BN behind it.

    Args:
      layer: maps to ``(B, ..., C)``.
      last_bn: of C features.
      averaged: whether the network averages the layer's output over places. The statistics are
        then those of the averages, and what is averaged later is the normalized average.
    """

    def __init__(self, layer: nnx.Module, last_bn: LastBN, *, averaged: bool):
        self.layer = layer
        self.last_bn = last_bn
        self.averaged = averaged

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Maps as ``layer`` does, to at least float32."""
        logits = self.layer(*args, **kwargs)  # type: ignore[operator]
        if not self.averaged:
            return self.last_bn(logits)
        places = tuple(range(1, logits.ndim - 1))
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        statistics = self.last_bn.statistics(jnp.mean(wide, axis=places))
        return normalize(wide, *statistics, self.last_bn.epsilon)


def along(values: jax.Array, axis: int, x: jax.Array) -> jax.Array:
    """Values ``(C,)`` in the shape and type in which they meet channels on an axis of ``x``."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape).astype(x.dtype)
