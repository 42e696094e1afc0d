"""Rules of convolutions and products of matrices."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, dtype_of, refused, result
from mimicnorm_jax.export.onnx_graph.layout import arrange
from mimicnorm_jax.export.onnx_graph.tensors import Tensor, is_static


def _convolution(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    parameters = equation.params
    tensor, kernel = inputs
    spatial = len(tensor.shape) - 2
    if parameters["batch_group_count"] != 1:
        raise refused(equation, "with groups of the batch")
    if not all(is_static(pad) for side in parameters["padding"] for pad in side):
        raise refused(equation, "whose padding depends on a symbolic extent")
    if tensor.dtype != dtype_of(equation.outvars[0]):
        raise refused(equation, "into another type")
    if spatial not in (1, 2, 3):
        raise refused(equation, f"over {spatial} axes")
    if any(dilation != 1 for dilation in parameters["lhs_dilation"]):
        return _transposed_convolution(graph, equation, tensor, kernel)
    if any(pad < 0 for side in parameters["padding"] for pad in side):
        raise refused(equation, "with negative padding")
    numbers = parameters["dimension_numbers"]
    name = graph.node(
        "Conv",
        _full(graph, tensor, numbers.lhs_spec),
        _full(graph, kernel, numbers.rhs_spec),
        **_attributes(equation, kernel),
        strides=_integers(parameters["window_strides"]),
        pads=_pads(parameters["padding"]),
    )
    return result(equation, name, numbers.out_spec)


def _full(graph: Graph, tensor: Tensor, order: Sequence[int]) -> str:
    return arrange(graph, tensor, order, order)


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values]


def _pads(sides: Any) -> list[int]:
    """All that is added before, then all that is added after."""
    return _integers([low for low, _ in sides] + [high for _, high in sides])


def _attributes(equation: Any, kernel: Tensor) -> dict[str, Any]:
    parameters = equation.params
    extents = [kernel.shape[axis] for axis in parameters["dimension_numbers"].rhs_spec[2:]]
    return {
        "dilations": _integers(parameters["rhs_dilation"]),
        "group": int(parameters["feature_group_count"]),
        "kernel_shape": _integers(extents),
    }


def _transposed_convolution(graph: Graph, equation: Any, tensor: Tensor, kernel: Tensor) -> Tensor:
    """A convolution over an array with gaps, as the transpose of one with strides.

    That reaches over all places a kernel touches; what JAX pads less is cut off, and what it pads
    more is zero.
    """
    parameters = equation.params
    if any(stride != 1 for stride in parameters["window_strides"]):
        raise refused(equation, "with strides over an array with gaps")
    if not kernel.is_constant:
        raise refused(equation, "over an array with gaps, with a computed kernel")
    numbers = parameters["dimension_numbers"]
    attributes = _attributes(equation, kernel)
    extents = zip(attributes["kernel_shape"], attributes["dilations"], strict=True)
    reach = [(extent - 1) * dilation for extent, dilation in extents]
    missing = [
        (size - low, size - high)
        for size, (low, high) in zip(reach, parameters["padding"], strict=True)
    ]
    name = graph.node(
        "ConvTranspose",
        _full(graph, tensor, numbers.lhs_spec),
        graph.constant(_flipped(kernel.value(), numbers.rhs_spec, attributes["group"])),
        **attributes,
        strides=_integers(parameters["lhs_dilation"]),
        pads=_pads([(max(low, 0), max(high, 0)) for low, high in missing]),
    )
    beyond = _pads([(max(-low, 0), max(-high, 0)) for low, high in missing])
    if any(beyond):
        half = len(beyond) // 2
        pads = graph.constant([0, 0, *beyond[:half], 0, 0, *beyond[half:]], np.int64)
        name = graph.node("Pad", name, pads)
    return result(equation, name, numbers.out_spec)


def _flipped(kernel: np.ndarray, order: Sequence[int], group: int) -> np.ndarray:
    """A kernel (O, I/group, ...) as the one (I, O/group, ...) of the transpose."""
    kernel = np.transpose(kernel, order)
    outputs, inputs, *extents = kernel.shape
    split = kernel.reshape(group, outputs // group, inputs, *extents).swapaxes(1, 2)
    joined = split.reshape(group * inputs, outputs // group, *extents)
    return np.ascontiguousarray(np.flip(joined, tuple(range(2, joined.ndim))))


def _product(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    dtype = dtype_of(equation.outvars[0])
    left, right = (_cast(graph, tensor, dtype) for tensor in inputs)
    (left_axes, right_axes), (left_batch, _) = equation.params["dimension_numbers"]
    if len(left_axes) == 1 and not left_batch and len(right.shape) == 2:
        return _dense(graph, equation, left, right, left_axes[0], right_axes[0])
    return _einsum(graph, equation, left, right)


def _cast(graph: Graph, tensor: Tensor, dtype: np.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    if tensor.array is not None:
        return Tensor(tensor.shape, dtype, tensor.axes, array=tensor.array.astype(dtype))
    return Tensor(tensor.shape, dtype, tensor.axes, graph.cast(tensor.name, dtype))


def _dense(
    graph: Graph, equation: Any, left: Tensor, right: Tensor, axis: int, right_axis: int
) -> Tensor:
    """A matrix times the last axis, or a convolution of width 1 where channels come second."""
    others = [other for other in range(len(left.shape)) if other != axis]
    new = {other: number for number, other in enumerate(others)}
    output = len(others)
    if len(left.axes) == len(left.shape) in (3, 4, 5) and left.axes[1] == axis:
        matrix = arrange(graph, right, (1 - right_axis, right_axis), (0, 1))
        extents = [1] * (len(left.shape) - 2)
        vector = graph.constant([*range(2, len(left.shape))], np.int64)
        kernel = graph.node("Unsqueeze", matrix, vector) if right.array is None else ""
        if right.array is not None:
            array = np.transpose(right.value(), (1 - right_axis, right_axis))
            kernel = graph.constant(array.reshape(*array.shape, *extents))
        name = graph.node("Conv", _full(graph, left, left.axes), kernel, kernel_shape=extents)
        kept = [new[other] for other in left.axes if other != axis]
        return result(equation, name, [kept[0], output, *kept[1:]])
    stored = [other for other in left.axes if other != axis]
    order = [*(stored or others[:1]), axis] if others else [axis]
    name = _full(graph, left, order)
    matrix = arrange(graph, right, (right_axis, 1 - right_axis), (0, 1))
    operator = "Gemm" if len(order) == 2 and left.dtype in (np.float32, np.float64) else "MatMul"
    name = graph.node(operator, name, matrix)
    return result(equation, name, [*(new[other] for other in order[:-1]), output])


def _einsum(graph: Graph, equation: Any, left: Tensor, right: Tensor) -> Tensor:
    """Any product of tensors, in whatever order they are stored."""
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    letters = iter(string.ascii_lowercase)
    left_letters = {axis: next(letters) for axis in range(len(left.shape))}
    pairs = [*zip(left_axes, right_axes, strict=True), *zip(left_batch, right_batch, strict=True)]
    shared = {axis: left_letters[other] for other, axis in pairs}
    right_letters = {
        axis: shared[axis] if axis in shared else next(letters) for axis in range(len(right.shape))
    }
    batch = [left_letters[axis] for axis in left_batch]
    free = [
        letter
        for taken, letters_of in (
            ({*left_axes, *left_batch}, left_letters),
            ({*right_axes, *right_batch}, right_letters),
        )
        for axis, letter in letters_of.items()
        if axis not in taken
    ]
    orders = [_full_order(tensor) for tensor in (left, right)]
    names = [_full(graph, *pair) for pair in zip((left, right), orders, strict=True)]
    left_term = "".join(left_letters[axis] for axis in orders[0])
    right_term = "".join(right_letters[axis] for axis in orders[1])
    output = [*batch, *free]
    kept = [letter for letter in dict.fromkeys(left_term + right_term) if letter in output]
    formula = f"{left_term},{right_term}->{''.join(kept)}"
    name = graph.node("Einsum", *names, equation=formula)
    return result(equation, name, [output.index(letter) for letter in kept])


def _full_order(tensor: Tensor) -> list[int]:
    absent = [axis for axis in range(len(tensor.shape)) if axis not in tensor.axes]
    return [*tensor.axes, *absent]


RULES: dict[str, Any] = {"conv_general_dilated": _convolution, "dot_general": _product}
