"""Convolution with its backward pass under control: what it keeps, and how a CPU computes it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.layers.order import after
from mimicnorm_jax.layers.storage import Codec, Stored, decode, encode, rounded
from mimicnorm_jax.layers.varying import as_varying, axes_of


class Geometry(NamedTuple):
    """Everything about a convolution but its operands; hashable.

    Attributes:
      strides: one a spatial axis.
      padding: ``"SAME"``, ``"VALID"`` or ``(low, high)`` a spatial axis.
      kernel_dilation: one a spatial axis.
      feature_group_count: number of groups the channels are split into.
      precision: ``jax.lax.Precision``.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int = 1
    precision: Any = None


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    codec: Codec | None = None,
    narrow: bool = True,
) -> jax.Array:
    """Convolves ``(B, *spatial, in)`` with ``(*window, in / groups, out)``.

    It has a derivative of its own, for reverse mode (``jax.grad``, ``jax.vjp``), for which it
    keeps the input and the kernel as they are given: no product with the scale, no cast.

    Args:
      x: the input, whose type is that of the computation and of the result.
      kernel: the kernel, of any floating-point type.
      geometry: strides, padding and the like.
      scale: a scalar that multiplies the kernel.
      offset: a scalar that is added to the input before it is padded.
      codec: how the input is kept for the backward pass; None: as it is.
      narrow: keep what a TPU's convolution takes of a float32 input, see ``rounded``. What
        costs nothing to compute again, like the output of a norm, is better not kept at all.
    """
    shared = _Shared(kernel, scale, offset)
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


# the input (whole, or rounded, or encoded), and what is shared
_Kept = tuple[jax.Array | Stored, jax.Array | None, _Shared]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, shared: _Shared, geometry: Geometry, codec: Codec | None, narrow: bool
) -> jax.Array:
    return _convolve_shared(x, shared, geometry)


def _forward(
    x: jax.Array, shared: _Shared, geometry: Geometry, codec: Codec | None, narrow: bool
) -> tuple[jax.Array, _Kept]:
    y = _convolve_shared(x, shared, geometry)
    if codec is not None:
        return y, (encode(x, codec), None, shared)
    usual = narrow and geometry.precision is None and shared.offset is None
    # Of what it is given here, a backend keeps only what its own backward pass takes.
    return y, (x, rounded(x) if usual else None, shared)


def _backward(
    geometry: Geometry, codec: Codec | None, narrow: bool, kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, _Shared]:
    x, shortened, shared = kept
    if isinstance(x, Stored):
        assert codec is not None
        x = decode(Stored(after(x.codes, gradient), x.step), codec, gradient.dtype)
    elif shortened is None:
        x = _late_on_cpu(x, gradient)
    else:
        x = lax.platform_dependent(
            x,
            shortened,
            gradient,
            cpu=lambda x, short, gradient: after(x, gradient),
            tpu=lambda x, short, gradient: short.astype(x.dtype),
            default=lambda x, short, gradient: x,
        )
    if shared.scale is not None:
        shared = shared._replace(kernel=_late_on_cpu(shared.kernel, gradient))
    # linear in either operand, so each gradient needs only the other
    _, transpose = jax.vjp(lambda x, shared: _convolve_shared(x, shared, geometry), x, shared)
    return transpose(gradient)


_convolve.defvjp(_forward, _backward)


def _late_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """``x``, of which nothing is made before ``gradient`` is there.

    XLA's CPU backend would transpose the input in the forward pass, and keep it twice.
    """
    return lax.platform_dependent(x, gradient, cpu=after, default=lambda x, gradient: x)


def _convolve_shared(x: jax.Array, shared: _Shared, geometry: Geometry) -> jax.Array:
    x, kernel = shared.operands(x)
    return _compute(x, kernel, geometry)


def _compute(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    library = functools.partial(_library, geometry=geometry)
    on_cpu = functools.partial(_as_matrices, geometry=geometry)
    if not _suits_matrices(x, kernel, geometry):
        return library(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=library)


def _library(x: jax.Array, kernel: jax.Array, *, geometry: Geometry) -> jax.Array:
    spatial = "HWDUVXYZ"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=geometry.feature_group_count,
        precision=geometry.precision,
    )


def _suits_matrices(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether a CPU is faster with matrix products than with XLA's convolution.

    An image smaller than the kernel falls to a naive loop there (a 3x3 kernel on VGG's last 2x2
    images: 90 times slower than this), and the kernel gradient of a 1x1 convolution is not seen
    to be a matrix product (3 to 8 times slower).
    """
    window, spatial = kernel.shape[:-2], x.shape[1:-1]
    plain = geometry.feature_group_count == 1 and set(geometry.kernel_dilation) == {1}
    padding = geometry.padding
    plain = plain and (isinstance(padding, str) or min(map(min, padding), default=0) >= 0)
    small = any(extent < size for extent, size in zip(spatial, window, strict=True))
    return plain and len(window) == 2 and (small or window == (1, 1))


def _as_matrices(x: jax.Array, kernel: jax.Array, *, geometry: Geometry) -> jax.Array:
    """The sum over the kernel's positions of products of shifted images and matrices."""
    window, strides, sides = kernel.shape[:2], geometry.strides, geometry.padding
    if isinstance(sides, str):
        sides = tuple(lax.padtype_to_pads(x.shape[1:3], window, strides, sides))
    x = jnp.pad(x, ((0, 0), *sides, (0, 0)))
    rows, columns = (
        (extent - size) // stride + 1
        for extent, size, stride in zip(x.shape[1:3], window, strides, strict=True)
    )

    def every(start: int, count: int, stride: int) -> slice:
        return slice(start, start + (count - 1) * stride + 1, stride)

    products = [
        jnp.matmul(
            x[:, every(i, rows, strides[0]), every(j, columns, strides[1])],
            kernel[i, j],
            precision=geometry.precision,
        )
        for i in range(window[0])
        for j in range(window[1])
    ]
    return functools.reduce(jnp.add, products)
