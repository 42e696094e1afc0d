"""How a convolution and both of its gradients are computed: by XLA, or what is faster on a CPU."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from mimicnorm_jax.layers.order import after_on_cpu
from mimicnorm_jax.layers.winograd import (
    winograd,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

_Sides = tuple[tuple[int, int], ...]
# lax's own, and those that repeat the input, by the names of ``jnp.pad``'s modes
_REPEATED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
PADDINGS = ("SAME", "SAME_LOWER", "VALID", *_REPEATED)


class Geometry(NamedTuple):
    """Everything about a convolution but its operands; hashable.

    Attributes:
      strides: one a spatial axis.
      padding: one of ``PADDINGS`` or ``(low, high)`` a spatial axis.
      kernel_dilation: one a spatial axis.
      feature_group_count: number of groups the channels are split into.
      precision: ``jax.lax.Precision``.
      input_dilation: one a spatial axis; ``()``: 1.
      preferred_element_type: type of the result; None: that of the operands.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int = 1
    precision: Any = None
    input_dilation: tuple[int, ...] = ()
    preferred_element_type: Any = None

    def padded_by_repetition(self, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Geometry]:
        """The input with what is repeated of it around it, and the geometry without that.

        As ``nnx.Conv``, whatever the strides: half of the window on each side, of an even one the
        larger half at the end.
        """
        if self.padding not in _REPEATED:
            return x, self
        window = kernel.shape[:-2]
        spans = [(n - 1) * d + 1 for n, d in zip(window, self.kernel_dilation, strict=True)]
        sides = [(0, 0), *(((span - 1) // 2, span // 2) for span in spans), (0, 0)]
        padded = jnp.pad(x, sides, mode=_REPEATED[self.padding])
        return padded, self._replace(padding="VALID")


def convolution(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves ``(B, *spatial, in)`` with ``(*window, in / groups, out)`` of the same type."""
    plainly = functools.partial(_plainly, geometry=geometry)
    if not _suits_winograd(x, kernel, geometry):
        return plainly(x, kernel)

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return winograd(_padded(x, kernel, geometry), kernel)

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=plainly)


def convolution_gradients(
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    geometry: Geometry,
    *,
    both: bool = True,
    lean: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of both operands, given that of the result.

    Those of a CPU are NaN for all images if one number is none, because one waits for another.

    Args:
      x, kernel, gradient: the operands, and the gradient of their convolution.
      geometry: strides, padding and the like.
      both: order them, so that memory is used again; what is not needed is computed then too.
      lean: save memory rather than time.
    """

    def plainly(
        x: jax.Array, kernel: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # linear in either operand, so each gradient needs only the other
        _, transpose = jax.vjp(lambda x, kernel: _plainly(x, kernel, geometry), x, kernel)
        return transpose(gradient)

    tiles_for_x = _suits_winograd(x, kernel, geometry)
    tiles_for_kernel = _suits_winograd(x, kernel, geometry, for_kernel=True) and not lean
    if not tiles_for_x and not tiles_for_kernel:
        return plainly(x, kernel, gradient)

    def on_cpu(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_x, of_kernel = plainly(x, kernel, gradient)
        if tiles_for_x:
            sides = [(2 - low, 2 - high) for low, high in _sides(x, kernel, geometry)]
            padded = jnp.pad(gradient, ((0, 0), *sides, (0, 0)))
            of_x = winograd_input_gradient(padded, kernel)
        if tiles_for_kernel:
            of_kernel = winograd_kernel_gradient(x, gradient, _sides(x, kernel, geometry))
        # else the kernel's would come last, and what it is made of would be kept until then
        return after_on_cpu(of_x, of_kernel) if both else of_x, of_kernel

    return lax.platform_dependent(x, kernel, gradient, cpu=on_cpu, default=plainly)


def _plainly(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
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
        lhs_dilation=geometry.input_dilation or None,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=geometry.feature_group_count,
        precision=geometry.precision,
        preferred_element_type=geometry.preferred_element_type,
    )


def _sides(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> _Sides:
    """The padding in numbers."""
    if not isinstance(geometry.padding, str):
        return geometry.padding
    extents, window = x.shape[1:-1], kernel.shape[:-2]
    return tuple(lax.padtype_to_pads(extents, window, geometry.strides, geometry.padding))


def _padded(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return jnp.pad(x, ((0, 0), *_sides(x, kernel, geometry), (0, 0)))


def _is_usual(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Two spatial axes of known extents, no groups, no dilation, no negative padding."""
    return (
        x.ndim == 4
        and not any(is_symbolic_dim(extent) for extent in x.shape[1:3])  # exported for any size
        and geometry.feature_group_count == 1
        and {*geometry.kernel_dilation, *geometry.input_dilation} == {1}
        and geometry.preferred_element_type is None
        and min(map(min, _sides(x, kernel, geometry))) >= 0
    )


def _suits_winograd(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, *, for_kernel: bool = False
) -> bool:
    """Whether a CPU is faster with ``winograd``, and takes little more memory: as measured.

    Its transforms move four times the data, for which many channels make up, and hold them, but
    for the kernel's gradient: so the rest is for images of 4x4 only. The kernel's, for which XLA
    takes up to three times as long, needs fewer channels: by the number of channels times the
    side of the image, as XLA's own speed goes. Where the input is large (over 64 MiB in float32)
    memory counts for more than time.

    The kernel is transformed as well, so few tiles do not pay, and of none there is no shape.
    Where the number of channels changes behind a pool, and on images of 2x2, the memory of the
    kernel's gradient would show in the peak of VGG11 with BatchNorm.
    """
    *window, inner, outer = kernel.shape
    one_by_one = geometry.strides == (1, 1) and geometry.precision is None
    if not _is_usual(x, kernel, geometry) or window != [3, 3] or not one_by_one:
        return False
    if kernel.dtype.itemsize < 4:  # sums that are rounded to bfloat16 would lose digits
        return False
    batch, *extents, _ = x.shape
    if is_symbolic_dim(batch):  # exported for batches of any size
        return False
    if for_kernel:
        enough = inner == outer and min(extents) >= 4 and inner * min(extents) >= 1024
        enough = enough and x.size <= 2**24
    else:
        enough = inner * outer >= 2**15 and extents == [4, 4]
    sides = _sides(x, kernel, geometry)
    padded = [extent + low + high for extent, (low, high) in zip(extents, sides, strict=True)]
    fits = max(map(max, sides)) <= 2 and all(n % 2 == 0 for n in (*extents, *padded))
    return enough and fits and batch * math.prod(n // 2 - 1 for n in padded) >= 128


def _suits_matrices(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether a CPU is faster with matrix products than with XLA's convolution.

    An image smaller than the kernel falls to a naive loop there (a 3x3 kernel on VGG's last 2x2
    images: 90 times slower than this), and the kernel gradient of a 1x1 convolution is not seen
    to be a matrix product (3 to 8 times slower).
    """
    if not _is_usual(x, kernel, geometry):
        return False
    window, spatial = kernel.shape[:-2], x.shape[1:-1]
    small = any(extent < size for extent, size in zip(spatial, window, strict=True))
    return small or window == (1, 1)


def _as_matrices(x: jax.Array, kernel: jax.Array, *, geometry: Geometry) -> jax.Array:
    """The sum over the kernel's positions of products of shifted images and matrices."""
    window, strides = kernel.shape[:2], geometry.strides
    x = _padded(x, kernel, geometry)
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
