"""Rules of the elementwise primitives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, dtype_of, refused, result
from mimicnorm_jax.export.onnx_graph.layout import arrange, common_order, elementwise
from mimicnorm_jax.export.onnx_graph.tensors import Tensor

_OPERATORS = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "add": "Add",
    "add_any": "Add",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
}
_LOGICAL = {"and": "And", "not": "Not", "or": "Or", "xor": "Xor"}
_SAME = (
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "pbroadcast",
    "pvary",
    "reduce_precision",
    "sharding_constraint",
    "stop_gradient",
)


def _direct(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    return elementwise(graph, equation, _OPERATORS[equation.primitive.name], inputs)


def _arithmetic(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """A sum or a product; of integers that grow evenly, it is noted how."""
    output = _direct(graph, equation, inputs)
    for tensor, other in (inputs, inputs[::-1]):
        value = other.scalar()
        if tensor.name in graph.progressions and isinstance(value, int):
            first, step = graph.progressions[tensor.name]
            added = equation.primitive.name == "add"
            new = (first + value, step) if added else (first * value, step * value)
            graph.progressions[output.name] = new
    return output


def _div(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    """A division; of a sum by how many are summed, the mean instead."""
    total, divisor = inputs
    mean, count = graph.means.get(total.name, ("", None))
    if mean and (divisor.scalar() or graph.sizes.get(divisor.name)) == count:
        return result(equation, mean, total.axes)
    return elementwise(graph, equation, "Div", inputs)


def _logical(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    if any(tensor.dtype != np.bool_ for tensor in inputs):
        raise refused(equation, "of the bits of integers")
    return elementwise(graph, equation, _LOGICAL[equation.primitive.name], inputs)


def _same(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    if equation.primitive.name == "reduce_precision":
        given = np.finfo(inputs[0].dtype)
        wanted = (equation.params["exponent_bits"], equation.params["mantissa_bits"])
        if wanted != (given.nexp, given.nmant):
            raise refused(equation, "to a type of its own")
    return inputs


def _max(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    for tensor, other in (inputs, inputs[::-1]):
        if other.scalar() == 0 and np.issubdtype(tensor.dtype, np.floating):
            return elementwise(graph, equation, "Relu", [tensor])
    return elementwise(graph, equation, "Max", inputs)


def _not_equal(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    equal = elementwise(graph, equation, "Equal", inputs)
    return elementwise(graph, equation, "Not", [equal])


def _convert(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    (tensor,) = inputs
    dtype = dtype_of(equation.outvars[0])
    if tensor.dtype == dtype:
        return tensor
    converted = elementwise(graph, equation, "Cast", [tensor], to=dtype)
    if tensor.name in graph.sizes:
        graph.sizes[converted.name] = graph.sizes[tensor.name]
    return converted


def _select(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    which, *cases = inputs
    if len(cases) != 2 or which.dtype != np.bool_:
        raise refused(equation, "of more than two cases")
    if (known := which.scalar()) is not None:  # such as whether a constant index is negative
        return cases[int(known)]
    if cases[0].dtype != np.bool_:
        return elementwise(graph, equation, "Where", [which, cases[1], cases[0]])
    # onnxruntime has no Where of booleans
    numbers = [_as_int32(graph, case) for case in cases]
    chosen = elementwise(graph, equation, "Where", [which, numbers[1], numbers[0]])
    return dataclasses.replace(chosen, name=graph.cast(chosen.name, np.bool_))


def _as_int32(graph: Graph, tensor: Tensor) -> Tensor:
    dtype = np.dtype(np.int32)
    if tensor.array is not None:
        return dataclasses.replace(tensor, dtype=dtype, array=tensor.array.astype(dtype))
    return dataclasses.replace(tensor, dtype=dtype, name=graph.cast(tensor.name, dtype))


def _clamp(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    low, tensor, high = inputs
    raised = elementwise(graph, equation, "Max", [tensor, low])
    return elementwise(graph, equation, "Min", [raised, high])


class _Composed:
    """Formulas of one operand: methods write nodes on its stored form, whatever its order."""

    def __init__(self, graph: Graph, equation: Any, tensor: Tensor):
        self.graph = graph
        self.equation = equation
        self.order = common_order([tensor])
        self.x = arrange(graph, tensor, self.order, leading=False)
        self.dtype = tensor.dtype

    def number(self, value: float) -> str:
        return self.graph.constant(value, self.dtype)

    def node(self, operator: str, *inputs: str) -> str:
        return self.graph.node(operator, *inputs)

    def rsqrt(self) -> str:
        return self.node("Reciprocal", self.node("Sqrt", self.x))

    def square(self) -> str:
        return self.node("Mul", self.x, self.x)

    def exp2(self) -> str:
        return self.node("Pow", self.number(2), self.x)

    def log1p(self) -> str:
        return self.node("Log", self.node("Add", self.x, self.number(1)))

    def expm1(self) -> str:
        """Is precise near zero, other than ``exp(x) - 1``."""
        half = self.node("Tanh", self.node("Mul", self.x, self.number(0.5)))
        return self.node("Mul", half, self.node("Add", self.node("Exp", self.x), self.number(1)))

    def erfc(self) -> str:
        return self.node("Sub", self.number(1), self.node("Erf", self.x))

    def is_finite(self) -> str:
        difference = self.node("Sub", self.x, self.x)  # NaN of what is infinite
        return self.node("Not", self.node("IsNaN", difference))

    def cbrt(self) -> str:
        root = self.node("Pow", self.node("Abs", self.x), self.number(1 / 3))
        return self.node("Mul", self.node("Sign", self.x), root)

    def round(self) -> str:
        if int(self.equation.params["rounding_method"]) == 1:  # to the nearest even
            return self.node("Round", self.x)
        size = self.node("Add", self.node("Abs", self.x), self.number(0.5))
        return self.node("Mul", self.node("Sign", self.x), self.node("Floor", size))

    def integer_pow(self) -> str:
        power = self.equation.params["y"]
        if power == -1:
            return self.node("Reciprocal", self.x)
        if power not in (2, 3, 4):
            return self.node("Pow", self.x, self.number(power))
        square = self.square()
        return square if power == 2 else self.node("Mul", square, self.x if power == 3 else square)


_COMPOSED = (
    "cbrt",
    "erfc",
    "exp2",
    "expm1",
    "integer_pow",
    "is_finite",
    "log1p",
    "round",
    "rsqrt",
    "square",
)


def _composed(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    formula = _Composed(graph, equation, inputs[0])
    name = getattr(formula, equation.primitive.name)()
    return result(equation, name, formula.order)


def _remainder(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
    return elementwise(graph, equation, "Mod", inputs, fmod=1)


RULES: dict[str, Any] = {
    **dict.fromkeys(_OPERATORS, _direct),
    **dict.fromkeys(_LOGICAL, _logical),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_COMPOSED, _composed),
    "add": _arithmetic,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "div": _div,
    "max": _max,
    "mul": _arithmetic,
    "ne": _not_equal,
    "rem": _remainder,
    "select_n": _select,
}
