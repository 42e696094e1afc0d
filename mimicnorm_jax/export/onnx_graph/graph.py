"""The graph being written: nodes and constants, without onnx itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export.onnx_graph.extents import Extents
from mimicnorm_jax.export.onnx_graph.tensors import Tensor

_MOST_SHARED_BYTES = 1024  # larger constants are not compared with one another


@dataclasses.dataclass
class Node:
    """An operator, with the names of what it reads and writes."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Graph:
    """Nodes in the order they run, and the constants they read.

    Attributes:
      opset: the version of the operators.
      nodes: each reads only what is written before it.
      constants: by their names.
      extents: computes symbolic extents.
      means: of what is a sum, by its name: the name of the mean, and how many are summed.
      sizes: the symbolic extents that tensors without axes hold, by their names.
      progressions: of integers that grow evenly along one axis: the first, and the step.
      parts: of concatenated integers: what each is.
    """

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.extents = Extents(self)
        self.means: dict[str, tuple[str, Any]] = {}
        self.sizes: dict[str, Any] = {}
        self.progressions: dict[str, tuple[int, int]] = {}
        self.parts: dict[str, list[Tensor]] = {}
        self._names: set[str] = set()
        self._written: dict[Any, list[str]] = {}
        self._shared: dict[Any, str] = {}

    def new_name(self, wanted: str) -> str:
        """A name that nothing else has."""
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def nodes_of(self, operator: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
        """Writes a node of several outputs, unless there is the same; returns their names."""
        key = (operator, inputs, count, repr(sorted(attributes.items())))
        if key not in self._written:
            outputs = [self.new_name(operator.lower()) for _ in range(count)]
            self.nodes.append(Node(operator, list(inputs), outputs, attributes))
            self._written[key] = outputs
        return self._written[key]

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Writes a node, unless there is the same already; returns the name of its output."""
        return self.nodes_of(operator, *inputs, count=1, **attributes)[0]

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Adds a constant to the graph; returns its name."""
        array = np.asarray(array, dtype)
        key: Any = None
        if array.nbytes <= _MOST_SHARED_BYTES:
            key = (str(array.dtype), array.shape, array.tobytes())
            if key in self._shared:
                return self._shared[key]
        name = self.new_name("constant")
        self.constants[name] = array
        if key is not None:
            self._shared[key] = name
        return name

    def vector(self, extents: Any) -> str:
        """The name of a vector of integers, some of which may be symbolic extents."""
        return self.extents.vector(list(extents))

    def reduce(self, operator: str, name: str, axes: list[int]) -> str:
        """Writes a reduction, whose axes are an input or an attribute by the opset."""
        if operator == "ReduceSum" or self.opset >= 18:
            return self.node(operator, name, self.constant(axes, np.int64), keepdims=0)
        return self.node(operator, name, axes=axes, keepdims=0)

    def cast(self, name: str, dtype: Any) -> str:
        """Writes a conversion to another type."""
        return self.node("Cast", name, to=np.dtype(dtype))


class UnwrittenError(UserError):
    """An equation that cannot be written; where it comes from is yet to be said."""


def refused(equation: Any, why: str) -> UserError:
    """The error for an equation that cannot be written, although its primitive has a rule."""
    return UnwrittenError(f"the ONNX export has no {equation.primitive.name} {why}")


def source(equation: Any) -> str:
    """The file and the line that an equation comes from; empty where only JAX's own are known."""
    return str(source_info_util.summarize(equation.source_info)).partition(" (")[0]


def result(equation: Any, name: str, axes: Any) -> Tensor:
    """The tensor that an equation's only output is, stored as ``name`` with these axes."""
    (variable,) = equation.outvars
    return Tensor(variable.aval.shape, dtype_of(variable), tuple(axes), name)


def dtype_of(variable: Any) -> np.dtype:
    """The type of a variable as NumPy has it."""
    dtype = variable.aval.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        raise UserError(f"ONNX has no type {dtype}, of random keys")
    return np.dtype(dtype)
