"""ReLU whose backward pass needs its output only, as the next layer keeps that anyway."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.layers.storage import (
    Codec,
    Stored,
    encode,
    first_derivative_only,
    rounded,
    unpack,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def relu(x: jax.Array, bits: int | None = None, normalized: bool = False) -> jax.Array:
    """``max(x, 0)``, with a derivative of its own, for reverse mode.

    The derivative of ``jax.nn.relu`` asks for the sign of its input, for which XLA may keep more
    than the output.

    Args:
      x: ``(B, ...)``.
      bits: of the codes that are kept of the output, and shared with the next convolution: 8 or 4;
        None: the output is kept as it is.
      normalized: whether x comes from a normalization, which keeps its own input: then y may be
        computed again from that.
    """
    return jnp.maximum(x, jnp.zeros((), x.dtype))


Kept = tuple[jax.Array | Stored, jax.Array | None]


def _forward(x: jax.Array, bits: int | None, normalized: bool) -> tuple[jax.Array, Kept]:
    y = relu(x)
    if bits is not None:
        return y, (encode(y, Codec(bits, rectified=True)), None)
    if normalized:
        return y, (y, None)
    # On GPUs XLA would compute y again in the backward pass, for its sign, from the convolution's
    # result, which it would then keep beside the y that the next convolution needs.
    y = lax.platform_dependent(
        y, cuda=lax.optimization_barrier, rocm=lax.optimization_barrier, default=lambda y: y
    )
    return y, (y, rounded(y))


def _backward(
    bits: int | None, normalized: bool, kept: Kept, gradient: jax.Array
) -> tuple[jax.Array]:
    y, shortened = kept
    if isinstance(y, Stored):
        assert bits is not None
        y, gradient = first_derivative_only((y, gradient))
        positive = unpack(y, Codec(bits, rectified=True)) > 0
    elif shortened is None:
        positive = y > 0
    else:
        positive = lax.platform_dependent(
            y, shortened, tpu=lambda y, short: short > 0, default=lambda y, short: y > 0
        )
    return (jnp.where(positive, gradient, jnp.zeros((), gradient.dtype)),)


relu.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Relu:
    """``relu`` with its arguments fixed: a part of a network's static structure."""

    bits: int | None = None
    normalized: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """``max(x, 0)``."""
        return relu(x, self.bits, self.normalized)
