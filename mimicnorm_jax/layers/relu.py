"""ReLU whose backward pass needs its output only, which the next layer keeps anyway."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.layers.storage import Codec, Stored, encode, unpack


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """``max(x, 0)``.

    The derivative of ``jax.nn.relu`` asks for the sign of its input, and XLA's CPU backend then
    keeps input and output of every ReLU.
    """
    return jnp.maximum(x, jnp.zeros((), x.dtype))


@relu.defjvp
def _relu_derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    y = relu(*primals)
    (tangent,) = tangents
    return y, jnp.where(y > 0, tangent, jnp.zeros((), tangent.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def encoded_relu(x: jax.Array, bits: int) -> jax.Array:
    """ReLU that keeps codes of its output, which the next convolution shares.

    Args:
      x: ``(B, ...)``.
      bits: of a code, 8 or 4.
    """
    return relu(x)


def _forward(x: jax.Array, bits: int) -> tuple[jax.Array, Stored]:
    y = relu(x)
    return y, encode(y, Codec(bits, rectified=True))


def _backward(bits: int, stored: Stored, gradient: jax.Array) -> tuple[jax.Array]:
    positive = unpack(stored, Codec(bits, rectified=True)) > 0
    return (jnp.where(positive, gradient, jnp.zeros((), gradient.dtype)),)


encoded_relu.defvjp(_forward, _backward)
