"""What stands for an array of JAX while its program becomes a graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def is_static(extent: Any) -> bool:
    """Whether an extent is a number, not an expression of ``jax.export.symbolic_shape``."""
    return isinstance(extent, int | np.integer)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array of JAX as it is stored: in another order of axes, and without some of them.

    Attributes:
      shape: of the array in JAX; extents may be symbolic.
      dtype: of the array in JAX.
      axes: ``axes[i]`` is the axis of ``shape`` along which axis ``i`` of what is stored lies. An
        axis that is absent is 1 long, or the array is the same all along it.
      name: in the graph; empty where the array is constant.
      array: the constant, stored as ``axes`` say.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    axes: tuple[int, ...]
    name: str = ""
    array: np.ndarray | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the values are known now, and so is the shape."""
        return self.array is not None and all(map(is_static, self.shape))

    def value(self) -> np.ndarray:
        """The whole constant, in the order of its axes in JAX."""
        assert self.array is not None
        stored = np.transpose(self.array, np.argsort(self.axes))
        absent = tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)
        return np.broadcast_to(np.expand_dims(stored, absent), self.shape)

    def scalar(self) -> Any:
        """The one value of a constant that is the same everywhere, else None."""
        return self.array.item() if self.array is not None and self.array.size == 1 else None

    def relabeled(self, shape: tuple[Any, ...], axes: tuple[int, ...]) -> Tensor:
        """The same stored array, read as another one."""
        return dataclasses.replace(self, shape=shape, axes=axes)


def constant(array: Any) -> Tensor:
    """The tensor of known values; axes 1 long are left out of what is stored."""
    array = np.asarray(array)
    axes = tuple(axis for axis, extent in enumerate(array.shape) if extent != 1)
    stored = array.reshape([array.shape[axis] for axis in axes])
    return Tensor(array.shape, array.dtype, axes, array=stored)
