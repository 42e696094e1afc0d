"""Rules of what takes parts of an array: slices, reversals, gathers of whole slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from mimicnorm_jax.export.onnx_graph.graph import Graph, refused, result
from mimicnorm_jax.export.onnx_graph.layout import arrange, stored_with, without
from mimicnorm_jax.export.onnx_graph.shapes import squeezed
from mimicnorm_jax.export.onnx_graph.tensors import Tensor, constant, is_static


def _cut(
    graph: Graph,
    tensor: Tensor,
    starts: Sequence[Any],
    limits: Sequence[Any],
    strides: Sequence[int],
) -> str:
    """Writes a Slice of the stored axes that are not taken whole."""
    tensor = stored_with(graph, tensor, ())
    cut = [
        axis
        for axis in tensor.axes
        if not (starts[axis] == 0 and limits[axis] == tensor.shape[axis] and strides[axis] == 1)
    ]
    if not cut:
        return tensor.name
    places = [tensor.axes.index(axis) for axis in cut]
    vectors = [[values[axis] for axis in cut] for values in (starts, limits)]
    vectors += [places, [strides[axis] for axis in cut]]
    return graph.node("Slice", tensor.name, *(graph.vector(vector) for vector in vectors))


def _slice(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    parameters, (tensor,) = equation.params, inputs
    strides = parameters["strides"] or (1,) * len(tensor.shape)
    name = _cut(graph, tensor, parameters["start_indices"], parameters["limit_indices"], strides)
    return result(equation, name, tensor.axes)


def _part(graph: Graph, tensor: Tensor, axis: int, start: int, count: Any, step: int = 1) -> Tensor:
    """Every ``step``-th entry along an axis, ``count`` of them."""
    starts, strides, limits = [0] * len(tensor.shape), [1] * len(tensor.shape), [*tensor.shape]
    starts[axis], strides[axis], limits[axis] = start, step, start + step * (count - 1) + 1
    shape = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
    return Tensor(shape, tensor.dtype, tensor.axes, _cut(graph, tensor, starts, limits, strides))


def taken(graph: Graph, tensor: Tensor, index: int) -> Tensor:
    """One entry along the first axis, which is taken away."""
    if tensor.is_constant:
        return constant(tensor.value()[index])
    starts = [index, *(0 for _ in tensor.shape[1:])]
    limits = [index + 1, *tensor.shape[1:]]
    name = _cut(graph, tensor, starts, limits, [1] * len(starts))
    shape = (1, *tensor.shape[1:])
    return squeezed(graph, Tensor(shape, tensor.dtype, tensor.axes, name), [0])


def _dynamic_slice(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    tensor, *indices = inputs
    for axis, (index, size) in enumerate(zip(indices, equation.params["slice_sizes"], strict=True)):
        if size == tensor.shape[axis]:
            continue
        start = index.scalar()
        if start is None:
            raise refused(equation, "whose start depends on the input")
        if not is_static(tensor.shape[axis]) and start != 0:
            raise refused(equation, "of a symbolic extent")
        if start != 0:  # JAX moves a slice inward that begins too late
            start = min(max(start, 0), tensor.shape[axis] - size)
        tensor = _part(graph, tensor, axis, start, size)
    return tensor


def _reverse(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    tensor = stored_with(graph, inputs[0], ())
    axes = [axis for axis in tensor.axes if axis in equation.params["dimensions"]]
    places = [tensor.axes.index(axis) for axis in axes]
    if not places:
        return tensor
    count, last = len(places), np.iinfo(np.int64).min + 1
    vectors = ([-1] * count, [last] * count, places, [-1] * count)
    names = [graph.constant(vector, np.int64) for vector in vectors]
    return result(equation, graph.node("Slice", tensor.name, *names), tensor.axes)


def _gather(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """Entries of one axis, of several in a grid, or one slice of several axes."""
    tensor, indices = inputs
    numbers = equation.params["dimension_numbers"]
    sizes = equation.params["slice_sizes"]
    if numbers.operand_batching_dims:
        raise refused(equation, "along axes of a batch")
    axes = tuple(numbers.start_index_map)
    others = [axis for axis in range(len(tensor.shape)) if axis not in axes]
    if any(sizes[axis] != tensor.shape[axis] for axis in others):
        raise refused(equation, "of parts of the axes")
    grid = _grid(graph, indices)
    if grid:
        return _gather_grid(graph, equation, tensor, grid)
    if len(axes) != 1 or tuple(numbers.collapsed_slice_dims) != axes:
        raise refused(equation, "along several axes that is no grid")
    return _gather_along(graph, equation, tensor, indices, axes[0])


def _grid(graph: Graph, indices: Tensor) -> list[Tensor]:
    """The indices of each axis where each grows along an axis of its own; else nothing."""
    parts = graph.parts.get(indices.name, [])
    if indices.is_constant:
        parts = [_varying(part) for part in np.moveaxis(indices.value(), -1, 0)]
    axes = [axis for part in parts for axis in part.axes]
    known = all(part.is_constant or part.name in graph.progressions for part in parts)
    separate = all(len(part.axes) <= 1 for part in parts) and len(set(axes)) == len(axes)
    return parts if known and separate else []


def _varying(array: np.ndarray) -> Tensor:
    """The constant, stored only along those axes where it is not the same everywhere."""
    first = [array.take([0], axis) for axis in range(array.ndim)]
    same = [bool(np.all(entry == array)) for entry in first]
    axes = tuple(axis for axis in range(array.ndim) if not same[axis])
    stored = array[tuple(0 if is_same else slice(None) for is_same in same)]
    return Tensor(array.shape, array.dtype, axes, array=np.asarray(stored))


def _gather_grid(graph: Graph, equation: Any, tensor: Tensor, grid: list[Tensor]) -> Tensor:
    numbers, shape = equation.params["dimension_numbers"], equation.outvars[0].aval.shape
    batch = [number for number in range(len(shape)) if number not in numbers.offset_dims]
    collapsed = numbers.collapsed_slice_dims
    others = [axis for axis in range(len(tensor.shape)) if axis not in collapsed]
    new = dict(zip(others, numbers.offset_dims, strict=True))
    for axis, part in zip(numbers.start_index_map, grid, strict=True):
        size = equation.params["slice_sizes"][axis]
        if part.axes and axis not in collapsed:
            raise refused(equation, "of several slices")
        tensor = _entries(graph, equation, tensor, axis, part, size)
        if part.axes:
            new[axis] = batch[part.axes[0]]
    tensor = without(graph, tensor, [axis for axis in tensor.axes if axis not in new])
    return tensor.relabeled(shape, tuple(new[axis] for axis in tensor.axes))


def _entries(
    graph: Graph, equation: Any, tensor: Tensor, axis: int, part: Tensor, size: Any
) -> Tensor:
    """Entries along an axis, by a Slice where the indices grow evenly; or one of a size."""
    count = part.shape[part.axes[0]] if part.axes else size
    extent = tensor.shape[axis]
    first, step = graph.progressions.get(part.name, (0, 0))
    if part.array is not None:
        values = np.atleast_1d(_inside(equation, part.array, extent, size))
        steps = set(np.diff(values).tolist()) or {1}
        first, step = int(values[0]), steps.pop()
        if steps or step < 1:
            return _chosen(graph, tensor, axis, values)
    elif step < 1 or first < 0 or equation.params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS:
        raise refused(equation, "that may be outside of the array")
    return _part(graph, stored_with(graph, tensor, [axis]), axis, first, count, step)


def _chosen(graph: Graph, tensor: Tensor, axis: int, values: np.ndarray) -> Tensor:
    tensor, index = stored_with(graph, tensor, [axis]), graph.constant(values, np.int64)
    name = graph.node("Gather", tensor.name, index, axis=tensor.axes.index(axis))
    shape = (*tensor.shape[:axis], len(values), *tensor.shape[axis + 1 :])
    return Tensor(shape, tensor.dtype, tensor.axes, name)


def _inside(equation: Any, index: Any, extent: Any, size: Any = 1) -> np.ndarray:
    """Constant indices as JAX takes them: those outside are moved in, or refused."""
    mode = equation.params["mode"]
    if size == extent:
        return np.zeros_like(index)
    if not (is_static(extent) and is_static(size)):
        if np.any(index != 0) and mode != GatherScatterMode.PROMISE_IN_BOUNDS:
            raise refused(equation, "that may be outside of the array")
        return index
    inside = np.clip(index, 0, extent - size)
    if mode == GatherScatterMode.FILL_OR_DROP and np.any(inside != index):
        raise refused(equation, "outside of the array")
    return inside


def _gather_along(
    graph: Graph, equation: Any, tensor: Tensor, indices: Tensor, axis: int
) -> Tensor:
    numbers, shape = equation.params["dimension_numbers"], equation.outvars[0].aval.shape
    indices = squeezed(graph, indices, [len(indices.shape) - 1])
    index = _index(graph, equation, indices, tensor.shape[axis])
    tensor = stored_with(graph, tensor, [axis])
    place = tensor.axes.index(axis)
    name = graph.node("Gather", tensor.name, index, axis=place)
    batch = [number for number in range(len(shape)) if number not in numbers.offset_dims]
    others = [other for other in range(len(tensor.shape)) if other != axis]
    new = dict(zip(others, numbers.offset_dims, strict=True))
    before = [new[other] for other in tensor.axes[:place]]
    after = [new[other] for other in tensor.axes[place + 1 :]]
    return result(equation, name, [*before, *batch, *after])


def _index(graph: Graph, equation: Any, indices: Tensor, extent: Any) -> str:
    """The indices in the order of their axes, in full, inside of the array."""
    mode = equation.params["mode"]
    order = range(len(indices.shape))
    if indices.is_constant and is_static(extent):
        return graph.constant(_inside(equation, indices.value(), extent), np.int64)
    if mode == GatherScatterMode.FILL_OR_DROP:
        raise refused(equation, "that may be outside of the array")
    name = graph.cast(arrange(graph, indices, order, order), np.int64)
    if mode == GatherScatterMode.CLIP:
        if is_static(extent):
            last = graph.constant(extent - 1, np.int64)
        else:
            last = graph.node("Sub", graph.vector([extent]), graph.constant([1], np.int64))
            last = graph.node("Squeeze", last)
        name = graph.node("Min", graph.node("Max", name, graph.constant(0, np.int64)), last)
    return name


RULES: dict[str, Any] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "rev": _reverse,
    "slice": _slice,
}
