"""Rules of the reductions over windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, refused, result
from mimicnorm_jax.export.onnx_graph.layout import arrange
from mimicnorm_jax.export.onnx_graph.shapes import squeezed
from mimicnorm_jax.export.onnx_graph.tensors import Tensor, is_static

_KINDS = {"add": "sum", "add_any": "sum", "max": "max", "min": "min"}


def _pooled_axes(equation: Any) -> list[int]:
    parameters = equation.params
    windows = zip(
        parameters["window_dimensions"],
        parameters["window_strides"],
        parameters["padding"],
        strict=True,
    )
    return [
        axis
        for axis, (extent, stride, sides) in enumerate(windows)
        if (extent, stride, *sides) != (1, 1, 0, 0)
    ]


def _pool(graph: Graph, equation: Any, tensor: Tensor, kind: str) -> Tensor:
    """Writes a pooling, with the axes that are not pooled first, whatever they are."""
    parameters = equation.params
    if any(dilation != 1 for dilation in parameters["base_dilation"]):
        raise refused(equation, "over an array with gaps")
    if kind == "sum" and any(dilation != 1 for dilation in parameters["window_dilation"]):
        raise refused(equation, "of sums with gaps")
    if not all(is_static(pad) and pad >= 0 for side in parameters["padding"] for pad in side):
        raise refused(equation, "with padding that is negative or depends on a symbolic extent")
    if not all(map(is_static, equation.params["window_dimensions"])):
        raise refused(equation, "with a window as large as a symbolic extent")
    pooled = _pooled_axes(equation)
    if not pooled:
        return tensor
    # operators take exactly two axes before those of the window
    tensor = tensor.relabeled((1, 1, *tensor.shape), tuple(axis + 2 for axis in tensor.axes))
    absent = [axis for axis in range(2, len(tensor.shape)) if axis not in tensor.axes]
    order = [*tensor.axes, *absent]
    free = [axis for axis in order if axis - 2 not in pooled]
    leading = [*range(2 - len(free)), *free][:2]
    spatial = [axis for axis in order if axis not in leading]
    if len(spatial) > 3:
        raise refused(equation, "over more than three axes")
    name = arrange(graph, tensor, [*leading, *spatial], order)
    name = _operator(graph, equation, name, [axis - 2 for axis in spatial], kind)
    shape = (1, 1, *equation.outvars[0].aval.shape)
    axes = (*leading, *spatial)
    return squeezed(graph, Tensor(shape, tensor.dtype, axes, name), [0, 1])


def _operator(graph: Graph, equation: Any, name: str, axes: list[int], kind: str) -> str:
    parameters = equation.params
    extents, strides, dilations = (
        [int(parameters[key][axis]) for axis in axes]
        for key in ("window_dimensions", "window_strides", "window_dilation")
    )
    sides = [parameters["padding"][axis] for axis in axes]
    pads = [int(low) for low, _ in sides] + [int(high) for _, high in sides]
    attributes = {"kernel_shape": extents, "strides": strides, "pads": pads}
    if kind == "sum":
        mean = graph.node("AveragePool", name, count_include_pad=1, **attributes)
        dtype = equation.outvars[0].aval.dtype
        total = graph.node("Mul", mean, graph.constant(math.prod(extents), dtype))
        graph.means[total] = mean, math.prod(extents)
        return total
    return graph.node("MaxPool", name, dilations=dilations, **attributes)


def _window(graph: Graph, equation: Any, tensor: Tensor, kind: str) -> Tensor:
    if kind != "min":
        return _pool(graph, equation, tensor, kind)
    opposite = graph.node("Neg", arrange(graph, tensor, tensor.axes))
    negative = Tensor(tensor.shape, tensor.dtype, tensor.axes, opposite)
    pooled = _pool(graph, equation, negative, "max")
    return result(equation, graph.node("Neg", pooled.name), pooled.axes)


def _named(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    return _window(graph, equation, inputs[0], equation.primitive.name.rpartition("_")[2])


def _general(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """A window with a function of two numbers and a first value of its own."""
    jaxpr = equation.params["jaxpr"]
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    kind = _KINDS.get(equations[0].primitive.name) if len(equations) == 1 else None
    if kind is None or len(inputs) != 2:
        raise refused(equation, "of functions other than sums, maxima and minima")
    tensor, start = inputs
    first = start.scalar()
    neutral = {"sum": 0.0, "max": -np.inf, "min": np.inf}[kind]
    if first is None or (kind == "sum" and first != neutral):
        raise refused(equation, "of sums that begin with more than zero")
    pooled = _window(graph, equation, tensor, kind)
    if first == neutral:
        return pooled
    operator = {"max": "Max", "min": "Min"}[kind]
    value = graph.constant(first, tensor.dtype)
    return result(equation, graph.node(operator, pooled.name, value), pooled.axes)


RULES: dict[str, Any] = {
    "reduce_window": _general,
    "reduce_window_max": _named,
    "reduce_window_min": _named,
    "reduce_window_sum": _named,
}
