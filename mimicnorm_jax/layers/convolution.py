"""Convolution with its backward pass under control: what it keeps of its input, and when."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import custom_vjp_primal_tree_values

from mimicnorm_jax.layers.convolution_forms import (
    Geometry,
    convolution,
    convolution_gradients,
)
from mimicnorm_jax.layers.order import after, after_on_cpu
from mimicnorm_jax.layers.storage import (
    NO_SECOND_DERIVATIVE,
    Codec,
    Stored,
    decode,
    encode,
    first_derivative_only,
    rounded,
)
from mimicnorm_jax.layers.varying import as_varying, axes_of

Differentiable = Literal["once", "twice"]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    codec: Codec | None = None,
    narrow: bool = True,
    differentiable: Differentiable = "once",
) -> jax.Array:
    """Convolves ``(B, *spatial, in)`` with ``(*window, in / groups, out)``.

    It has a derivative of its own, for reverse mode (``jax.grad``, ``jax.vjp``), for which it
    keeps the input and the kernel as they are given: no product with the scale, no cast.
    (Reverse mode of that works as well, but with a codec.)

    Args:
      x: the input, whose type is that of the computation and of the result.
      kernel: the kernel, of any floating-point type.
      geometry: strides, padding and the like.
      scale: a scalar that multiplies the kernel.
      offset: a scalar that is added to the input before it is padded.
      codec: how the input is kept for the backward pass; None: as it is.
      narrow: keep what a TPU's convolution takes of a float32 input, see ``rounded``. What
        costs nothing to compute again, like the output of a norm, is better not kept at all.
      differentiable: ``"twice"``: JAX's own derivatives, of any order and mode, in more memory.

    Raises:
      ValueError: ``"twice"`` with a codec: codes have no derivative.
    """
    shared = _Shared(kernel, scale, offset)
    if differentiable == "twice":
        if codec is not None:
            raise ValueError(NO_SECOND_DERIVATIVE)
        return _convolved(x, shared, geometry)
    # Under shard_map: the forms of the derivative for several backends must agree in what may
    # differ between devices. The derivative of the cast sums over those that share an operand.
    axes = frozenset().union(*(axes_of(leaf) for leaf in jax.tree.leaves((x, shared))))
    return _convolve(*as_varying((x, shared), axes), geometry, codec, narrow)


class _Shared(NamedTuple):
    """What is the same for all examples."""

    kernel: jax.Array
    scale: jax.Array | None
    offset: jax.Array | None

    def operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both operands of the convolution."""
        kernel = self.kernel if self.scale is None else self.kernel * self.scale
        x = x if self.offset is None else x + self.offset.astype(x.dtype)
        return x, kernel.astype(x.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What the derivative is taken by."""

    kernel: bool


# the input (whole, or rounded, or encoded), what is shared, and what there are derivatives by
_Kept = tuple[jax.Array | Stored, jax.Array | None, _Shared, _Wanted]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, shared: _Shared, geometry: Geometry, codec: Codec | None, narrow: bool
) -> jax.Array:
    return _convolved(x, shared, geometry)


def _convolved(x: jax.Array, shared: _Shared, geometry: Geometry) -> jax.Array:
    x, kernel = shared.operands(x)
    x, geometry = geometry.padded_by_repetition(x, kernel)
    return convolution(x, kernel, geometry)


def _forward(
    primal: Any, primals: Any, geometry: Geometry, codec: Codec | None, narrow: bool
) -> tuple[jax.Array, _Kept]:
    wanted = _Wanted(kernel=any(leaf.perturbed for leaf in primals if leaf is not None))
    shared: _Shared
    x, shared = custom_vjp_primal_tree_values((primal, primals))
    y = _convolved(x, shared, geometry)
    if codec is not None:
        return y, (encode(x, codec), None, shared, wanted)
    usual = narrow and geometry.precision is None and shared.offset is None
    # Of what it is given here, a backend keeps only what its own backward pass takes.
    return y, (x, rounded(x) if usual else None, shared, wanted)


def _backward(
    geometry: Geometry, codec: Codec | None, narrow: bool, kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, _Shared]:
    x, shortened, shared, wanted = kept
    if isinstance(x, Stored):
        assert codec is not None
        x, shared, gradient = first_derivative_only((x, shared, gradient))
        x = decode(Stored(after(x.codes, gradient), x.step), codec, gradient.dtype)
    elif shortened is None:
        x = _late_on_cpu(x, gradient)
    else:
        x = lax.platform_dependent(
            x,
            shortened,
            gradient,
            cpu=lambda x, short, gradient: after_on_cpu(x, gradient),
            tpu=lambda x, short, gradient: short.astype(x.dtype),
            default=lambda x, short, gradient: x,
        )
    if shared.scale is not None:
        shared = shared._replace(kernel=_late_on_cpu(shared.kernel, gradient))
    (x, kernel), to_given = jax.vjp(lambda x, shared: shared.operands(x), x, shared)
    if geometry.preferred_element_type is not None:  # JAX 0.8 wants operands of one type
        gradient = gradient.astype(x.dtype)
        geometry = geometry._replace(preferred_element_type=None)
    (x, geometry), to_unpadded = _padding_and_its_transpose(x, kernel, geometry)
    of_x, of_kernel = convolution_gradients(
        x, kernel, gradient, geometry, both=wanted.kernel, lean=codec is not None
    )
    return to_given((to_unpadded(of_x), of_kernel))


def _padding_and_its_transpose(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[tuple[jax.Array, Geometry], Callable[[jax.Array], jax.Array]]:
    padded, plain = geometry.padded_by_repetition(x, kernel)
    if plain is geometry:
        return (x, geometry), lambda gradient: gradient
    _, transpose = jax.vjp(lambda x: geometry.padded_by_repetition(x, kernel)[0], x)
    return (padded, plain), lambda gradient: transpose(gradient)[0]


# symbolic_zeros: _forward is told by what the derivative is taken (a gradient is never a zero here)
_convolve.defvjp(_forward, _backward, symbolic_zeros=True)


def _late_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """``x``, of which nothing is made before ``gradient`` is there.

    XLA's CPU backend would transpose the input in the forward pass, and keep it twice.
    """
    return lax.platform_dependent(x, gradient, cpu=after_on_cpu, default=lambda x, gradient: x)
