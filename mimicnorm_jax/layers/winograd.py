"""3x3 convolutions with 16 products where 36 are usual (Winograd; Lavin and Gray 2016).

A tile of 2x2 outputs takes 4x4 inputs. Both are transformed along rows and along columns, and
then every position of a transformed tile has a matrix product of its own: the algorithm
F(2x2, 3x3), whose transforms only add and halve: in float32 its error is up to five times that
of the direct sum. What is here is for CPUs.

Images are padded, ``(B, H, W, in)`` with H and W even, and outputs ``(B, H - 2, W - 2, out)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimicnorm_jax.layers.order import after_on_cpu

_Rows = tuple[tuple[float, ...], ...]
# outputs = A ((G kernel G') * (B inputs B')) A'; theirs are the transposes of this A and B
_B: _Rows = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G: _Rows = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A: _Rows = ((1, 1, 1, 0), (0, 1, -1, -1))


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves images with a kernel ``(3, 3, in, out)``."""
    return _convolved(x, [[kernel[i, j] for j in range(3)] for i in range(3)])


def winograd_input_gradient(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of images without padding; that of the outputs is padded as images are.

    It is a convolution with the kernel turned by 180 degrees, its channels exchanged.
    """
    turned = [[kernel[2 - i, 2 - j] for j in range(3)] for i in range(3)]
    return _convolved(gradient, turned, exchanged=True)


def _convolved(x: jax.Array, kernels: list[list[jax.Array]], exchanged: bool = False) -> jax.Array:
    tiles = _every_other(x, 4)
    products: list[list[jax.Array]] = []
    for b_row, g_row in zip(_B, _G, strict=True):
        products.append([])
        for b_column, g_column in zip(_B, _G, strict=True):
            matrix = _sum(g_row, g_column, kernels)
            # by the product: transposed as an array it would be read across, 16 times
            matrix = matrix.T if exchanged else matrix
            products[-1].append(_sum(b_row, b_column, tiles) @ matrix)
    outputs = [[_sum(row, column, products) for column in _A] for row in _A]
    lines = jnp.stack([jnp.stack(of_row, axis=3) for of_row in outputs], axis=2)
    batch, height, width, _ = x.shape
    return lines.reshape(batch, height - 2, width - 2, -1)


def winograd_kernel_gradient(
    x: jax.Array, gradient: jax.Array, sides: Sequence[tuple[int, int]]
) -> jax.Array:
    """The gradient of the kernel ``(3, 3, in, out)``, given images and that of the outputs.

    Args:
      x: images ``(B, H, W, in)`` that are not padded yet: no padded copy takes memory.
      gradient: ``(B, H + sum(sides[0]) - 2, W + sum(sides[1]) - 2, out)``.
      sides: the padding of rows and of columns, at most 2 each.
    """
    tiles, outputs = _every_other_padded(x, sides), _every_other(gradient, 2)
    products: list[list[jax.Array]] = []
    for row in range(4):
        products.append([])
        for column in range(4):
            tile = _sum(_B[row], _B[column], tiles)
            output = _sum(_column(_A, row), _column(_A, column), outputs)
            # flat: a product over three axes is several times slower
            product = tile.reshape(-1, x.shape[-1]).T @ output.reshape(-1, gradient.shape[-1])
            products[-1].append(product)
            # one position at a time is in memory
            tiles = _every_other_padded(after_on_cpu(x, product), sides)
            outputs = _every_other(after_on_cpu(gradient, product), 2)
    window = [[_sum(_column(_G, i), _column(_G, j), products) for j in range(3)] for i in range(3)]
    return jnp.stack([jnp.stack(of_row) for of_row in window])


def _every_other_padded(x: jax.Array, sides: Sequence[tuple[int, int]]) -> list[list[jax.Array]]:
    """``_every_other(padded x, 4)``, each padded by itself.

    A slice comes first: XLA fuses the padding of slices into their sum, but stores a whole image
    that is padded and then sliced.
    """

    def lines(extent: int, low: int, high: int, i: int) -> tuple[slice, tuple[int, int]]:
        count = (extent + low + high) // 2 - 1
        before = max(0, (low - i + 1) // 2)  # lines of padding
        first = i - low + 2 * before
        there = min(count - before, (extent - first + 1) // 2)
        return slice(first, first + 2 * there, 2), (before, count - before - there)

    def plane(i: int, j: int) -> jax.Array:
        (rows, above), (columns, left) = (
            lines(extent, *side, n)
            for extent, side, n in zip(x.shape[1:3], sides, (i, j), strict=True)
        )
        return jnp.pad(x[:, rows, columns], ((0, 0), above, left, (0, 0)))

    return [[plane(i, j) for j in range(4)] for i in range(4)]


def _column(rows: _Rows, index: int) -> list[float]:
    return [row[index] for row in rows]


def _every_other(x: jax.Array, count: int) -> list[list[jax.Array]]:
    """Row i and column j of all tiles, of which each begins 2 after the one before."""
    rows, columns = (extent - count + 2 for extent in x.shape[1:3])
    return [
        [x[:, i : i + rows : 2, j : j + columns : 2] for j in range(count)] for i in range(count)
    ]


def _sum(
    row: Sequence[float], column: Sequence[float], matrix: Sequence[Sequence[jax.Array]]
) -> jax.Array:
    """``row matrix column'``, with nothing where a factor is 0 and no product where it is 1."""
    total = None
    for i, by_row in enumerate(row):
        for j, by_column in enumerate(column):
            factor = by_row * by_column
            if factor:
                term = matrix[i][j] if abs(factor) == 1 else abs(factor) * matrix[i][j]
                if total is None:
                    total = term if factor > 0 else -term
                else:
                    total = total + term if factor > 0 else total - term
    assert total is not None
    return total
