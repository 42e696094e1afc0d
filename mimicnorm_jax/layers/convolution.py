"""Convolution with what it keeps for its backward pass under control."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import lax

from mimicnorm_jax.layers.storage import Codec, Stored, decode, encode
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
    offset: jax.Array | None = None,
    codec: Codec | None = None,
) -> jax.Array:
    """Convolves ``(B, *spatial, in)`` with ``(*window, in / groups, out)``.

    Args:
      x: the input.
      kernel: the kernel, of the input's type.
      geometry: strides, padding and the like.
      offset: a scalar that is added to the input before it is padded.
      codec: how the input is kept for the backward pass; None: as it is.
    """
    if codec is None:
        return _plain(x if offset is None else x + offset, kernel, geometry)
    # A custom derivative does not sum over the devices what they share; a cast does.
    kernel, offset = as_varying((kernel, offset), axes_of(x))
    return _stored(x, kernel, offset, geometry, codec)


def _plain(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stored(
    x: jax.Array, kernel: jax.Array, offset: jax.Array | None, geometry: Geometry, codec: Codec
) -> jax.Array:
    return _plain(x if offset is None else x + offset, kernel, geometry)


_Kept = tuple[Stored, jax.Array, jax.Array | None]


def _stored_forward(
    x: jax.Array, kernel: jax.Array, offset: jax.Array | None, geometry: Geometry, codec: Codec
) -> tuple[jax.Array, _Kept]:
    y = _plain(x if offset is None else x + offset, kernel, geometry)
    return y, (encode(x, codec), kernel, offset)


def _stored_backward(
    geometry: Geometry, codec: Codec, kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    stored, kernel, offset = kept
    x = decode(stored, codec, kernel.dtype)
    x = x if offset is None else x + offset
    # linear in either operand, so each gradient needs only the other
    _, transpose = jax.vjp(lambda x, kernel: _plain(x, kernel, geometry), x, kernel)
    to_input, to_kernel = transpose(gradient)
    return to_input, to_kernel, None if offset is None else to_input.sum().astype(offset.dtype)


_stored.defvjp(_stored_forward, _stored_backward)
