"""The walk through a jaxpr: what is constant is computed, the rest becomes nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export.onnx_graph import (
    elementwise,
    indexing,
    linear,
    pooling,
    reductions,
    shapes,
)
from mimicnorm_jax.export.onnx_graph.fusion import fuse
from mimicnorm_jax.export.onnx_graph.graph import Graph, UnwrittenError, dtype_of, refused, source
from mimicnorm_jax.export.onnx_graph.layout import arrange
from mimicnorm_jax.export.onnx_graph.model import build_model, import_onnx
from mimicnorm_jax.export.onnx_graph.tensors import Tensor, constant, is_static

# A rule takes the graph, the equation and its operands, and returns one tensor or one an output.
Rule = Callable[[Graph, Any, list[Tensor]], Tensor | list[Tensor]]

_RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **indexing.RULES,
    **linear.RULES,
    **pooling.RULES,
    **reductions.RULES,
    **shapes.RULES,
}
_CALLS = {
    "call",
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}
_LAZY = {"broadcast_in_dim", "transpose"}  # need no computing, of constants too


def to_onnx(
    function: Callable[..., Any],
    specs: Sequence[jax.ShapeDtypeStruct],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int = 17,
) -> Any:
    """Writes a function as an ONNX model.

    What the function computes from its own constants alone is computed now. The axes of images
    are moved once, at the first convolution: ONNX has channels before height and width.

    Args:
      function: takes one array for each of ``specs``, returns an array or a tree of arrays.
      specs: shapes, whose extents may be those of ``jax.export.symbolic_shape``, and types.
      input_names: of the arrays that the function takes.
      output_names: of those that it returns, flattened.
      opset: the version of ONNX's operators, 17 or later.

    Returns:
      The ``onnx.ModelProto``, checked.

    Raises:
      UserError: the function has an operation that is not written, names do not match its
        arrays, constants take more than 2 GB, or onnx is not installed.
    """
    import_onnx()
    if opset < 17:
        raise UserError(f"opset must be 17 or later, not {opset}")
    program = jax.make_jaxpr(function)(*specs)
    _check_names(input_names, len(program.in_avals), "arrays that the function takes")
    _check_names(output_names, len(program.out_avals), "arrays that the function returns")
    _check_names([*input_names, *output_names], len(input_names) + len(output_names), "arrays")
    graph = Graph(opset)
    names = [graph.new_name(name) for name in input_names]
    operands = []
    for name, aval in zip(names, program.in_avals, strict=True):
        axes = tuple(range(len(aval.shape)))
        operands.append(Tensor(aval.shape, np.dtype(aval.dtype), axes, name))
        graph.extents.define(name, aval.shape)
    outputs = [_whole(graph, output) for output in _write(graph, program, operands)]
    fuse(graph, outputs)
    inputs = [(tensor.name, tensor.shape, tensor.dtype) for tensor in operands]
    typed = zip(output_names, program.out_avals, strict=True)
    described = [(name, aval.shape, np.dtype(aval.dtype)) for name, aval in typed]
    return build_model(graph, inputs, outputs, described)


def _check_names(names: Sequence[str], count: int, what: str) -> None:
    if len(names) != count:
        raise UserError(f"{count} {what} have {len(names)} names: {', '.join(names)}")
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"the names of the {what} must differ: {', '.join(names)}")


def _whole(graph: Graph, tensor: Tensor) -> str:
    order = range(len(tensor.shape))
    return arrange(graph, tensor, order, order)


def _write(graph: Graph, program: Any, operands: list[Tensor]) -> list[Tensor]:
    """Writes a jaxpr, closed or without constants; returns its outputs."""
    jaxpr = getattr(program, "jaxpr", program)
    constants = [constant(value) for value in getattr(program, "consts", ())]
    known: dict[Any, Tensor] = dict(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, operands, strict=True))

    def read(variable: Any) -> Tensor:
        if isinstance(variable, Literal):
            return constant(np.asarray(variable.val, dtype_of(variable)))
        return known[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        known.update(zip(equation.outvars, _equation(graph, equation, inputs), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _equation(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    try:
        return _outputs(graph, equation, inputs)
    except UnwrittenError as error:
        where = source(equation)
        if not where:  # inside of a function of JAX: the equation that calls it knows
            raise
        raise UserError(f"{error} ({where})") from error


def _outputs(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    name = equation.primitive.name
    if name in _CALLS:
        return _write(graph, _called(equation), inputs)
    if name == "scan":
        return _unrolled(graph, equation, inputs)
    if name == "cond":
        return _branch(graph, equation, inputs)
    if name not in _LAZY and _computable(equation, inputs):
        return _computed(equation, inputs)
    if name not in _RULES:
        raise _no_rule(equation)
    output = _RULES[name](graph, equation, inputs)
    return output if isinstance(output, list) else [output]


def _no_rule(equation: Any) -> UserError:
    return UnwrittenError(
        f"the ONNX export has no rule for the primitive {equation.primitive.name}"
    )


def _called(equation: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return equation.params[name]
    raise _no_rule(equation)


def _computable(equation: Any, inputs: list[Tensor]) -> bool:
    outputs = [variable.aval.shape for variable in equation.outvars]
    static = all(is_static(extent) for shape in outputs for extent in shape)
    known = all(tensor.is_constant for tensor in inputs)
    return static and known and "dim" not in equation.params and not equation.effects


def _computed(equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    values = [jax.numpy.asarray(tensor.value()) for tensor in inputs]
    outputs = equation.primitive.bind(*values, **equation.params)
    outputs = outputs if equation.primitive.multiple_results else [outputs]
    return [constant(output) for output in outputs]


def _branch(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    index, *operands = inputs
    chosen = index.scalar()
    if chosen is None:
        raise refused(equation, "whose branch depends on the input")
    branches = equation.params["branches"]
    branch = branches[min(max(int(chosen), 0), len(branches) - 1)]
    return _write(graph, branch, operands)


def _unrolled(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Writes the body of a scan once for each step.

    What is carried keeps its number of axes; what is scanned has one more outside of the body.
    """
    body, length = equation.params["jaxpr"], equation.params["length"]
    if not is_static(length):
        raise refused(equation, "of a symbolic length")
    results = zip(equation.outvars, body.out_avals, strict=True)
    stacked = sum(len(out.aval.shape) > len(aval.shape) for out, aval in results)
    ranks = zip(inputs, body.in_avals, strict=True)
    scanned = sum(len(tensor.shape) > len(aval.shape) for tensor, aval in ranks)
    carried = len(body.out_avals) - stacked
    first = len(inputs) - carried - scanned
    constants, carry, sequences = (
        inputs[:first],
        inputs[first : first + carried],
        inputs[first + carried :],
    )
    steps = range(length)
    slices: dict[int, list[Tensor]] = {}
    for step in reversed(steps) if equation.params["reverse"] else steps:
        taken = [indexing.taken(graph, sequence, step) for sequence in sequences]
        outputs = _write(graph, body, [*constants, *carry, *taken])
        carry, slices[step] = outputs[:carried], outputs[carried:]
    stacks = [[slices[step][number] for step in steps] for number in range(stacked)]
    return [*carry, *(shapes.stacked(graph, tensors) for tensors in stacks)]
