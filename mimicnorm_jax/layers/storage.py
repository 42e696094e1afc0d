"""Activations kept for the backward pass in 8 or 4 bits.

Without normalization in between, a convolution needs of its input only what enters the gradient
of its kernel, and ReLU only the sign. So both may keep codes of a few bits in place of the
activation. The forward pass, the gradient with respect to inputs and ReLU's mask stay exact; the
gradient of a kernel, and of a scalar that multiplies it, is that of the decoded inputs.

Every example has a scale of its own, so that what is kept of it depends neither on the other
examples nor on how the batch is spread over devices and micro-batches.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.layers.order import materialized

ActivationStorage = Literal["full", "int8", "int4"]
STORAGES: tuple[str, ...] = get_args(ActivationStorage)
NO_SECOND_DERIVATIVE = (
    "activations that are stored in codes (activation_storage='int8' or 'int4') have no second "
    "derivative: use activation_storage='full'"
)
_Tree = TypeVar("_Tree")


class Codec(NamedTuple):
    """How activations are encoded.

    Let s be the step: the largest magnitude of an example, over the largest code.

    Rectified activations become ``q = ceil(x / s)`` and come back as ``(q - 1/2) s``, and 0 as 0:
    a positive value keeps a positive code (but for one that is 1e-38 of the largest), and the error
    is within s/2 either way. Others become ``q = round(x / s)`` and come back as ``q s``. Both are
    then rounded to the type of the computation.

    Rounding is deterministic. Where the density of x hardly changes within a step, the error has
    mean 0 and variance s^2/12; in general its mean is not 0, at most s/2 in magnitude.

    Attributes:
      bits: 8 or 4. Two codes of 4 bits share a byte, one of either half of the batch.
      rectified: whether activations are never negative.
    """

    bits: int
    rectified: bool

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 if self.rectified else 2 ** (self.bits - 1) - 1


class Stored(NamedTuple):
    """An encoded activation.

    Attributes:
      codes: uint8, ``(B, ...)`` with 8 bits, ``(ceil(B / 2), ...)`` with 4.
      step: float32 ``(B, 1, ...)``.
    """

    codes: jax.Array
    step: jax.Array


def codec_of(storage: str, *, rectified: bool) -> Codec | None:
    """The codec of ``"int8"`` or ``"int4"``; None for ``"full"``."""
    return None if storage == "full" else Codec(int(storage.removeprefix("int")), rectified)


def encode(x: jax.Array, codec: Codec) -> Stored:
    """Encodes activations ``(B, ...)``, each example by its own scale."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(1, x.ndim))
    peak = jnp.max(wide if codec.rectified else jnp.abs(wide), axis=axes, keepdims=True)
    step = peak / codec.largest
    scaled = wide / jnp.where(step > 0, step, 1.0)
    if codec.rectified:
        codes = jnp.clip(jnp.ceil(scaled), 0, codec.largest)
    else:  # two's complement, in unsigned numbers
        codes = jnp.round(scaled) + jnp.where(scaled < -0.5, 2.0**codec.bits, 0.0)
    codes = codes.astype(jnp.uint8)
    if codec.bits == 4:
        low, high = _halves(codes)
        codes = low | (high << 4)
    # Else the compiler may keep the activation after all, and encode it again when it is needed.
    return Stored(materialized(codes, step), step)


def _halves(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first half of the batch and the second, made as long with a zero if it must be."""
    half = (len(codes) + 1) // 2
    sides = ((0, 2 * half - len(codes)),) + ((0, 0),) * (codes.ndim - 1)
    return codes[:half], jnp.pad(codes[half:], sides)


def unpack(stored: Stored, codec: Codec) -> jax.Array:
    """The codes ``(B, ...)``, one a byte."""
    if codec.bits == 8:
        return stored.codes
    both = jnp.concatenate([stored.codes & 0xF, stored.codes >> 4])
    return both[: len(stored.step)]


def decode(stored: Stored, codec: Codec, dtype: jnp.dtype) -> jax.Array:
    """The activations ``(B, ...)``, but for the rounding that ``Codec`` describes."""
    codes = unpack(stored, codec).astype(stored.step.dtype)
    if codec.rectified:
        values = jnp.maximum(codes - 0.5, 0.0)
    else:
        values = codes - jnp.where(codes > codec.largest, 2.0**codec.bits, 0.0)
    return (values * stored.step).astype(dtype)


@jax.custom_jvp
def first_derivative_only(tree: _Tree) -> _Tree:
    """A tree of arrays as it is, in a backward pass that decodes: to differentiate it is an error.

    Codes are integers. JAX takes them for constants, and would be wrong without a word.

    Raises:
      ValueError: when it is differentiated.
    """
    return tree


@first_derivative_only.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise ValueError(NO_SECOND_DERIVATIVE)


def rounded(x: jax.Array) -> jax.Array | None:
    """What a TPU's convolution takes of a float32 input at the default precision: bfloat16.

    To keep that is exact there, and takes half of the memory. None for other types, and where
    another precision was asked for.
    """
    default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype != jnp.float32 or default not in (None, "default", "bfloat16"):
        return None
    return lax.optimization_barrier(x.astype(jnp.bfloat16))
