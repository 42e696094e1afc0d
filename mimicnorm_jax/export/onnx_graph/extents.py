"""Symbolic extents, as ``jax.export.symbolic_shape`` makes them, computed in the graph."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export.onnx_graph.tensors import is_static

_OPERATORS: dict[type, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_FUNCTIONS = {"max": "Max", "min": "Min", "mod": "Mod"}
_NUMERIC = {"max": max, "min": min, "mod": lambda a, b: a % b, "floordiv": lambda a, b: a // b}


def _parse(extent: Any) -> ast.expr:
    return ast.parse(str(extent).replace("^", "**"), mode="eval").body


def _linear(extent: Any) -> tuple[str, int, int] | None:
    """The name, the factor and the offset of an extent such as ``32*h + 1``; None of others."""
    tree = _parse(extent)
    functions = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {
        function.id for function in functions if isinstance(function, ast.Name)
    }
    if len(names) != 1:
        return None
    (name,) = names
    code = compile(ast.Expression(tree), "extent", "eval")
    at = [eval(code, {"__builtins__": {}}, {**_NUMERIC, name: value}) for value in (0, 1, 2, 7)]
    offset, factor = at[0], at[1] - at[0]
    if not factor or at != [factor * value + offset for value in (0, 1, 2, 7)]:
        return None
    return name, factor, offset


class Extents:
    """Computes extents from the shapes of the graph's inputs, each once."""

    def __init__(self, graph: Any):  # a Graph, which has one of these
        self._graph = graph
        self._names: dict[str, str] = {}  # of vectors of one number, by the extents' text

    def define(self, name: str, shape: Any) -> None:
        """Learns what the shape of an input says: ``h``, of an extent ``32*h``."""
        graph = self._graph
        for axis, extent in enumerate(shape):
            linear = None if is_static(extent) else _linear(extent)
            if linear is None or linear[0] in self._names:
                continue
            symbol, factor, offset = linear
            value = graph.node("Shape", name, start=axis, end=axis + 1)
            self._names[str(extent)] = value
            if offset:
                value = graph.node("Sub", value, self._number(offset))
            if factor != 1:
                value = graph.node("Div", value, self._number(factor))
            self._names[symbol] = value

    def vector(self, extents: list[Any]) -> str:
        """The name of the vector of these extents."""
        if all(map(is_static, extents)):
            return self._graph.constant(np.asarray(extents, np.int64).reshape(-1))
        names = [self._name(extent) for extent in extents]
        return names[0] if len(names) == 1 else self._graph.node("Concat", *names, axis=0)

    def scalar(self, extent: Any) -> str:
        """The name of an extent as a tensor without axes."""
        return self._graph.node("Squeeze", self._name(extent), self._number(0))

    def _number(self, value: int) -> str:
        return self._graph.constant([value], np.int64)

    def _name(self, extent: Any) -> str:
        if is_static(extent):
            return self._number(int(extent))
        text = str(extent)
        if text not in self._names:
            self._names[text] = self._emit(_parse(extent))
        return self._names[text]

    def _emit(self, tree: ast.expr) -> str:
        match tree:
            case ast.Constant(value=int(value)):
                return self._number(value)
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._graph.node("Mul", self._number(-1), self._emit(operand))
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
                product = base = self._emit(left)
                for _ in range(power - 1):
                    product = self._graph.node("Mul", product, base)
                return product
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                name = _OPERATORS[type(operator)]
                return self._graph.node(name, self._emit(left), self._emit(right))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self._call(name, [self._emit(argument) for argument in arguments])
        raise UserError(f"the extent {ast.unparse(tree)} does not follow from an input's shape")

    def _call(self, function: str, arguments: list[str]) -> str:
        if function == "floordiv":  # Div rounds toward zero, floordiv down
            remainder = self._graph.node("Mod", *arguments)
            multiple = self._graph.node("Sub", arguments[0], remainder)
            return self._graph.node("Div", multiple, arguments[1])
        if function not in _FUNCTIONS:
            raise UserError(f"an extent has the unknown function {function}")
        return self._graph.node(_FUNCTIONS[function], *arguments)
