"""Rules of the reductions over whole axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, dtype_of, refused, result
from mimicnorm_jax.export.onnx_graph.layout import stored_with
from mimicnorm_jax.export.onnx_graph.tensors import Tensor

_OPERATORS = {
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_sum": "ReduceSum",
    "reduce_and": "ReduceMin",
    "reduce_or": "ReduceMax",
    "argmax": "ArgMax",
    "argmin": "ArgMin",
}


def _kept(tensor: Tensor, axes: tuple[int, ...]) -> list[int]:
    """Which axes of the result the stored ones are that are not reduced."""
    kept = [axis for axis in tensor.axes if axis not in axes]
    return [axis - sum(other < axis for other in axes) for axis in kept]


def _reduce(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    axes = tuple(equation.params["axes"])
    tensor = stored_with(graph, inputs[0], axes)
    places = sorted(tensor.axes.index(axis) for axis in axes)
    logical = tensor.dtype == np.bool_
    name = graph.cast(tensor.name, np.int32) if logical else tensor.name
    if places:
        source, name = name, graph.reduce(_OPERATORS[equation.primitive.name], name, places)
        if equation.primitive.name == "reduce_sum" and np.issubdtype(tensor.dtype, np.floating):
            mean = graph.reduce("ReduceMean", source, places)
            graph.means[name] = mean, math.prod(tensor.shape[axis] for axis in axes)
    name = graph.cast(name, np.bool_) if logical else name
    return result(equation, name, _kept(tensor, axes))


def _arg(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    (axis,) = equation.params["axes"]
    tensor = stored_with(graph, inputs[0], [axis])
    operator = _OPERATORS[equation.primitive.name]
    name = graph.cast(tensor.name, np.int32) if tensor.dtype == np.bool_ else tensor.name
    name = graph.node(operator, name, axis=tensor.axes.index(axis), keepdims=0)
    name = graph.cast(name, dtype_of(equation.outvars[0]))
    return result(equation, name, _kept(tensor, (axis,)))


def _cumulative_sum(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    axis, reverse = equation.params["axis"], equation.params["reverse"]
    tensor = stored_with(graph, inputs[0], [axis])
    if tensor.dtype == np.bool_:
        raise refused(equation, "of booleans")
    place = graph.constant(tensor.axes.index(axis), np.int64)
    name = graph.node("CumSum", tensor.name, place, reverse=int(reverse))
    return result(equation, name, tensor.axes)


RULES: dict[str, Any] = {
    **dict.fromkeys(_OPERATORS, _reduce),
    "argmax": _arg,
    "argmin": _arg,
    "cumsum": _cumulative_sum,
}
