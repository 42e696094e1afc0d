"""Rules of what changes shapes alone: broadcasts, transposes, reshapes, concatenations, pads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, refused, result
from mimicnorm_jax.export.onnx_graph.layout import (
    arrange,
    common_order,
    dropped,
    is_one,
    stored_with,
    without,
)
from mimicnorm_jax.export.onnx_graph.tensors import Tensor, is_static

_ALL = np.iinfo(np.int64).max


def _broadcast(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """Writes nothing: where an axis is not stored, operators broadcast along it."""
    tensor, *_ = inputs
    shape = equation.outvars[0].aval.shape
    places = equation.params["broadcast_dimensions"]
    longer = [
        axis
        for axis in tensor.axes
        if is_one(tensor.shape[axis]) and not is_one(shape[places[axis]])
    ]
    tensor = without(graph, tensor, longer)
    return tensor.relabeled(shape, tuple(places[axis] for axis in tensor.axes))


def _transpose(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    permutation = list(equation.params["permutation"])
    axes = tuple(permutation.index(axis) for axis in inputs[0].axes)
    return inputs[0].relabeled(equation.outvars[0].aval.shape, axes)


def squeezed(graph: Graph, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The tensor without some axes, each 1 long."""
    return dropped(without(graph, tensor, axes), axes)


def _squeeze(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    return squeezed(graph, inputs[0], equation.params["dimensions"])


@dataclasses.dataclass
class _Group:
    """Axes that a reshape makes of others, apart from all the rest."""

    old: list[int]
    new: list[int]


def _groups(old: Sequence[Any], new: Sequence[Any]) -> list[_Group]:
    """The smallest groups of axes whose numbers of elements are equal; no axis is 1 long."""
    groups: list[_Group] = []
    i = j = 0
    while i < len(old) and j < len(new):
        last_i, last_j = min(_equal_parts(old, new, i, j), key=sum, default=(len(old), len(new)))
        groups.append(_Group([*range(i, last_i)], [*range(j, last_j)]))
        i, j = last_i, last_j
    return groups


def _equal_parts(
    old: Sequence[Any], new: Sequence[Any], i: int, j: int
) -> Iterator[tuple[int, int]]:
    """Where parts from ``i`` and ``j`` on may end that have as many elements, of any extents."""
    for last_i in range(i + 1, len(old) + 1):
        for last_j in range(j + 1, len(new) + 1):
            if math.prod(old[i:last_i]) == math.prod(new[j:last_j]):
                yield last_i, last_j


def reshaped(graph: Graph, tensor: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """The tensor in another shape; axes are moved only where they are split or joined."""
    ones = [axis for axis, extent in enumerate(tensor.shape) if is_one(extent)]
    dense = squeezed(graph, tensor, ones)
    kept = [axis for axis, extent in enumerate(shape) if not is_one(extent)]
    groups = _groups(dense.shape, [shape[axis] for axis in kept])
    whole = [group for group in groups if len(group.old) > 1 or len(group.new) > 1]
    stored = {axis for group in whole for axis in group.old} | set(dense.axes)
    present = [group for group in groups if group.old[0] in stored]
    if not whole:
        numbers = {group.old[0]: kept[group.new[0]] for group in groups}
        return dense.relabeled(shape, tuple(numbers[axis] for axis in dense.axes))
    places = {axis: place for place, axis in enumerate(dense.axes)}
    present.sort(key=lambda group: min(places.get(axis, math.inf) for axis in group.old))
    order = [axis for group in present for axis in group.old]
    name = arrange(graph, dense, order, order)
    axes = [kept[axis] for group in present for axis in group.new]
    old = [dense.shape[axis] for axis in order]
    vector = graph.vector(_target(old, [shape[axis] for axis in axes]))
    return Tensor(shape, tensor.dtype, tuple(axes), graph.node("Reshape", name, vector))


def _target(old: list[Any], new: list[Any]) -> list[Any]:
    """The shape for Reshape: 0 keeps an extent, and -1 stands for one symbolic extent."""
    target = [
        0 if not is_static(extent) and place < len(old) and old[place] == extent else extent
        for place, extent in enumerate(new)
    ]
    symbolic = [place for place, extent in enumerate(target) if not is_static(extent)]
    if len(symbolic) == 1:
        target[symbolic[0]] = -1
    return target


def _reshape(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    if equation.params.get("dimensions") is not None:
        raise refused(equation, "in another order of axes")
    shape = equation.outvars[0].aval.shape
    if math.prod(extent for extent in shape if is_static(extent)) == 0:
        raise refused(equation, "of an array without elements")
    return reshaped(graph, inputs[0], shape)


def joined(graph: Graph, tensors: Sequence[Tensor], axis: int) -> tuple[str, list[int]]:
    """Writes a concatenation along an axis; returns its name and what it stores."""
    order = common_order(tensors)
    if axis not in order:  # beside the one before, with which it may be joined next
        order.insert(order.index(axis - 1) + 1 if axis - 1 in order else len(order), axis)
    names = [arrange(graph, tensor, order, order) for tensor in tensors]
    return graph.node("Concat", *names, axis=order.index(axis)), order


def _concatenate(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    if len(inputs) == 1:
        return inputs[0]
    axis = equation.params["dimension"]
    name, order = joined(graph, inputs, axis)
    if axis == len(inputs[0].shape) - 1 and np.issubdtype(inputs[0].dtype, np.integer):
        parts = [squeezed(graph, tensor, [axis]) for tensor in inputs if tensor.shape[axis] == 1]
        graph.parts.update({name: parts} if len(parts) == len(inputs) else {})
    return result(equation, name, order)


def stacked(graph: Graph, tensors: Sequence[Tensor], place: int = 0) -> Tensor:
    """The tensors along a new axis."""
    before, after = tensors[0].shape[:place], tensors[0].shape[place:]
    parts = [
        tensor.relabeled(
            (*before, 1, *after), tuple(axis + (axis >= place) for axis in tensor.axes)
        )
        for tensor in tensors
    ]
    name, order = joined(graph, parts, place)
    return Tensor((*before, len(parts), *after), parts[0].dtype, tuple(order), name)


def _stack(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    return stacked(graph, inputs, equation.params["axis"])


def _split(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    if not all(map(is_static, sizes)):
        raise refused(equation, "into symbolic extents")
    shapes = [variable.aval.shape for variable in equation.outvars]
    tensor = inputs[0]
    if axis not in tensor.axes:
        return [tensor.relabeled(shape, tensor.axes) for shape in shapes]
    vector, place = graph.constant(sizes, np.int64), tensor.axes.index(axis)
    name = stored_with(graph, tensor, ()).name
    names = graph.nodes_of("Split", name, vector, count=len(sizes), axis=place)
    pairs = zip(shapes, names, strict=True)
    return [Tensor(shape, tensor.dtype, tensor.axes, name) for shape, name in pairs]


def _pad(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    tensor, value = inputs
    config = equation.params["padding_config"]
    if any(interior != 0 for _, _, interior in config):
        raise refused(equation, "between elements")
    changed = [axis for axis, (low, high, _) in enumerate(config) if (low, high) != (0, 0)]
    tensor = stored_with(graph, tensor, changed)
    name = _cropped(graph, tensor, config)
    sides = [config[axis] for axis in tensor.axes]
    pads = [_at_least_0(side[0]) for side in sides] + [_at_least_0(side[1]) for side in sides]
    if any(not (is_static(pad) and pad == 0) for pad in pads):
        name = graph.node("Pad", name, graph.vector(pads), arrange(graph, value, ()))
    return result(equation, name, tensor.axes)


def _at_least_0(pad: Any) -> Any:
    return max(pad, 0) if is_static(pad) else pad


def _cropped(graph: Graph, tensor: Tensor, config: Any) -> str:
    """Cuts off what negative pads say."""
    below = [axis for axis in tensor.axes if any(is_static(p) and p < 0 for p in config[axis][:2])]
    if not below:
        return tensor.name
    starts = [max(-config[axis][0], 0) for axis in below]
    ends = [config[axis][1] if config[axis][1] < 0 else _ALL for axis in below]
    places = [tensor.axes.index(axis) for axis in below]
    vectors = [graph.constant(vector, np.int64) for vector in (starts, ends, places)]
    return graph.node("Slice", tensor.name, *vectors)


def _iota(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """Counts along an axis of symbolic extent."""
    shape, axis = equation.outvars[0].aval.shape, equation.params["dimension"]
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    length = graph.constant(shape[axis], np.int64) if is_static(shape[axis]) else None
    numbers = graph.node("Range", zero, length or graph.extents.scalar(shape[axis]), one)
    name = graph.cast(numbers, equation.params["dtype"])
    graph.progressions[name] = (0, 1)
    return result(equation, name, [axis])


def _extent(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    extent = equation.params["dim"]
    name = graph.cast(graph.extents.scalar(extent), equation.outvars[0].aval.dtype)
    graph.sizes[name] = extent
    return result(equation, name, ())


RULES: dict[str, Any] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dim_as_value": _extent,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
