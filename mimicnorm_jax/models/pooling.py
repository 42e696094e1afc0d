"""Pooling shared by the architectures; single-dispatch as in ``channels``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim


class Window(NamedTuple):
    """Where a max-pool looks; arguments as for ``max_pool``."""

    window: int
    stride: int
    padding: int = 0
    plain: bool = False


@functools.singledispatch
def max_pool(
    x: jax.Array, *, window: int, stride: int, padding: int = 0, plain: bool = False
) -> jax.Array:
    """Max-pool as the maximum over strided slices, one for each position in the window.

    For the backward pass it keeps, in place of its input, which position had the maximum: a byte
    for every output. Where several have it, the first one gets the gradient, as with
    ``lax.reduce_window``, whose gradient (select and scatter) XLA's CPU backend computes about
    50 times slower.

    Args:
      x: ``(B, H, W, C)``.
      window: height and width of the window.
      stride: step of the window along both axes.
      padding: rows and columns added on each side, which never are the maximum.
      plain: ``lax.reduce_window`` after all, for inference and what reads its program. So are
        images of symbolic extents, see ``jax.export``.

    Returns:
      ``(B, H', W', C)`` with ``H' = (H + 2 padding - window) // stride + 1``.
    """
    if plain or any(is_symbolic_dim(extent) for extent in x.shape[1:3]):
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        extents, steps = (1, window, window, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, extents, steps, sides)
    return _max_pool(x, Window(window, stride, padding), x.shape[1:3])


@functools.singledispatch
def max_pool_activated(
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    *,
    window: int,
    stride: int,
    padding: int = 0,
    plain: bool = False,
) -> jax.Array:
    """``max_pool(activation(x))`` of a non-decreasing activation, which therefore may come last.

    It then acts on fewer values, and nothing of the larger ones is kept for the backward pass.

    Args:
      x: ``(B, H, W, C)``.
      activation: such as ReLU.
      window, stride, padding, plain: as for ``max_pool``.
    """
    pooled = max_pool(x, window=window, stride=stride, padding=padding, plain=plain)
    return activation(pooled)


def _slices(x: jax.Array, pool: Window) -> list[jax.Array]:
    """For every position in the window, the values ``(B, H', W', C)`` that stand there."""
    if pool.padding:
        sides = ((0, 0), (pool.padding,) * 2, (pool.padding,) * 2, (0, 0))
        x = jnp.pad(x, sides, constant_values=-jnp.inf)
    rows, columns = ((extent - pool.window) // pool.stride + 1 for extent in x.shape[1:3])

    def every(start: int, count: int) -> slice:
        return slice(start, start + (count - 1) * pool.stride + 1, pool.stride)

    positions = range(pool.window)
    return [x[:, every(i, rows), every(j, columns)] for i in positions for j in positions]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, pool: Window, extents: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.maximum, _slices(x, pool))


def _forward(x: jax.Array, pool: Window, extents: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    maximum, *others = _slices(x, pool)
    small = jnp.uint8 if pool.window**2 <= 256 else jnp.uint16
    position = jnp.zeros_like(maximum, small)
    for index, values in enumerate(others, start=1):
        position = jnp.where(values <= maximum, position, small(index))
        maximum = jnp.maximum(maximum, values)
    # Else the compiler may keep the input after all, and find the position again.
    return maximum, lax.optimization_barrier(position)


def _backward(
    pool: Window, extents: tuple[int, ...], position: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    """Sums, for each of the stride's phases, what the windows over such a place say.

    A phase is every stride-th row and column of the padded input. All sums are over arrays as
    small as the output; only their interleaving is as large as the input.
    """
    zero = jnp.zeros((), gradient.dtype)
    reach = [-(-(extent + pool.padding) // pool.stride) for extent in extents]  # phases' extents

    def said(row: int, column: int) -> jax.Array:
        """The gradients of one position in the window, where that stands in its phase."""
        here = jnp.where(position == row * pool.window + column, gradient, zero)
        sides = [(0, 0, 0)]
        for axis, offset in ((0, row), (1, column)):
            low = offset // pool.stride
            sides.append((low, reach[axis] - low - gradient.shape[1 + axis], 0))
        return lax.pad(here, zero, [*sides, (0, 0, 0)])

    def phase(top: int, left: int) -> jax.Array:
        rows, columns = (range(start, pool.window, pool.stride) for start in (top, left))
        parts = [said(row, column) for row in rows for column in columns]
        if not parts:  # where windows leave gaps
            return jnp.zeros((len(gradient), *reach, gradient.shape[-1]), gradient.dtype)
        return functools.reduce(jnp.add, parts)

    steps = range(pool.stride)
    lines = [jnp.stack([phase(top, left) for left in steps], axis=3) for top in steps]
    whole = jnp.stack(lines, axis=2)  # (B, H / s, s, W / s, s, C)
    height, width = (extent * pool.stride for extent in reach)
    whole = whole.reshape(len(gradient), height, width, gradient.shape[-1])
    first = pool.padding
    return (whole[:, first : first + extents[0], first : first + extents[1]],)


_max_pool.defvjp(_forward, _backward)


@functools.singledispatch
def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over height and width: ``(B, H, W, C)`` to ``(B, C)``."""
    if x.dtype == jnp.bfloat16:
        # Joined to what computed x, the mean is wrong on CPUs with jaxlib 0.11.2 and 0.12.0.1.
        x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return jnp.mean(x, axis=(1, 2))
