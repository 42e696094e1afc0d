"""Orders of axes: what an operator needs, brought about only where a tensor has another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, result
from mimicnorm_jax.export.onnx_graph.tensors import Tensor


def arrange(
    graph: Graph,
    tensor: Tensor,
    order: Sequence[int],
    expanded: Iterable[int] = (),
    *,
    leading: bool = True,
) -> str:
    """Stores a tensor with its axes in an order.

    Args:
      graph: takes the nodes.
      tensor: what is stored now.
      order: axes of the tensor, with all that it stores.
      expanded: those in full length; other absent ones become 1 long.
      leading: whether absent axes before all others are written, too. Elementwise operators do
        without.

    Returns:
      The name of an array with as many axes as ``order``, or fewer where not ``leading``.
    """
    order = list(order)
    assert set(tensor.axes) <= set(order)
    stored = [axis for axis in order if axis in tensor.axes]
    permutation = [tensor.axes.index(axis) for axis in stored]
    skipped = 0 if leading or not stored else order.index(stored[0])
    if not leading and not stored:
        skipped = len(order)
    inserted = [place - skipped for place, axis in enumerate(order) if axis not in stored]
    inserted = [place for place in inserted if place >= 0]
    name = _moved(graph, tensor, permutation, inserted)
    longer = {axis for axis in expanded if axis not in stored and not is_one(tensor.shape[axis])}
    if longer:
        shape = [tensor.shape[axis] if axis in longer else 1 for axis in order]
        name = graph.node("Expand", name, graph.vector(shape))
    return name


def _moved(graph: Graph, tensor: Tensor, permutation: list[int], inserted: list[int]) -> str:
    """Transposes what is stored, and inserts axes 1 long."""
    if tensor.array is not None:
        moved = np.expand_dims(np.transpose(tensor.array, permutation), tuple(inserted))
        return graph.constant(moved)
    name = tensor.name
    if permutation != sorted(permutation):
        name = graph.node("Transpose", name, perm=permutation)
    if inserted:
        name = graph.node("Unsqueeze", name, graph.constant(inserted, np.int64))
    return name


def is_one(extent: Any) -> bool:
    """Whether an extent is 1; symbolic ones are not."""
    return isinstance(extent, int) and extent == 1


def without(graph: Graph, tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """The tensor with some axes, each 1 long, no longer stored; they remain axes of it."""
    places = [place for place, axis in enumerate(tensor.axes) if axis in set(axes)]
    if not places:
        return tensor
    kept = tuple(axis for axis in tensor.axes if axis not in set(axes))
    if tensor.array is not None:
        array = np.squeeze(tensor.array, tuple(places))
        return Tensor(tensor.shape, tensor.dtype, kept, array=array)
    name = graph.node("Squeeze", tensor.name, graph.constant(places, np.int64))
    return Tensor(tensor.shape, tensor.dtype, kept, name)


def stored_with(graph: Graph, tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """The tensor with these axes stored in full length, at its end where they were absent."""
    absent = [axis for axis in axes if axis not in tensor.axes]
    order = (*tensor.axes, *absent)
    if tensor.name and not absent:
        return tensor
    return Tensor(tensor.shape, tensor.dtype, order, arrange(graph, tensor, order, absent))


def dropped(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """The tensor without some axes, none of which is stored."""
    kept = [axis for axis in range(len(tensor.shape)) if axis not in set(axes)]
    numbers = {axis: number for number, axis in enumerate(kept)}
    shape = tuple(tensor.shape[axis] for axis in kept)
    return tensor.relabeled(shape, tuple(numbers[axis] for axis in tensor.axes))


def common_order(tensors: Sequence[Tensor]) -> list[int]:
    """All axes that any of the tensors stores, in the order of the one that stores the most.

    Of equals, one that is computed decides: constants are reordered at no cost.
    """
    first = max(tensors, key=lambda tensor: (len(tensor.axes), bool(tensor.name)))
    if not first.name:
        computed = [tensor for tensor in tensors if tensor.name]
        first = max(computed, key=lambda tensor: len(tensor.axes), default=first)
    others = {axis for tensor in tensors for axis in tensor.axes} - set(first.axes)
    if not others:
        return list(first.axes)
    if list(first.axes) == sorted(first.axes):
        return sorted({*first.axes, *others})
    return [*first.axes, *sorted(others)]


def elementwise(
    graph: Graph, equation: Any, operator: str, tensors: Sequence[Tensor], **attributes: Any
) -> Tensor:
    """Writes an elementwise operator, in the order of axes that its operands are stored in."""
    order = common_order(tensors)
    names = [arrange(graph, tensor, order, leading=False) for tensor in tensors]
    return result(equation, graph.node(operator, *names, **attributes), order)
