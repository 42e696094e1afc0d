"""What a network computes, as a graph of its layers and of the operations between them.

The graph comes from a jaxpr: what is called is inlined, what is scanned is unrolled, and what lies
between the marks of ``mimicnorm_jax.convert.trace`` is one node, a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

Path = tuple[Any, ...]


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the network.

    Attributes:
      shape: of the array.
      node: what computes it; None for an input or a parameter.
      active: whether it depends on the network's inputs.
      learned: whether it is a parameter, or made of one, and does not depend on the inputs.
      constant: the array itself where it is a parameter or a number in the program.
      consumers: the nodes that take it.
      modules: the calls of modules, other than layers, that return it; the innermost first.
    """

    shape: tuple[int, ...]
    node: Node | None = None
    active: bool = False
    learned: bool = False
    constant: Any = None
    consumers: list[Node] = dataclasses.field(default_factory=list)
    modules: list[Call] = dataclasses.field(default_factory=list)
    _source: Value | None = None


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
      path: of the layer in the network.
      number: counts the calls in the program; a layer in a scanned body has several of one number.
      kernel_shape: of its kernel as it is seen in the call, without axes of a stack.
      ndim: axes of its input, likewise.
      told_mode: whether the call says ``use_running_average``.
      masked: whether the call leaves some values out of its statistics.
    """

    path: Path
    number: int
    kernel_shape: tuple[int, ...] = ()
    ndim: int = 0
    told_mode: bool = False
    masked: bool = False


@dataclasses.dataclass(eq=False)
class Node:
    """An operation, or a whole layer.

    Attributes:
      name: of the primitive; ``"layer"`` for a layer.
      inputs, outputs: the arrays.
      params: of the primitive.
      primitive: what computes it again; None for a layer.
      call: which layer it is.
      order: position in the program.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    params: dict[str, Any]
    primitive: Any = None
    call: Call | None = None
    order: int = 0

    @property
    def active_inputs(self) -> list[Value]:
        """The inputs that depend on the network's inputs."""
        return [value for value in self.inputs if value.active]


# Primitives that call a jaxpr once, by the parameter that holds it.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


class Graph:
    """The nodes on which the outputs of a network depend.

    Args:
      closed: the network's program.
      constants: its parameters and what else it holds, the first arguments of the program.
      num_learned: how many of these, from the first on, are parameters.

    Attributes:
      inputs: the network's own inputs.
      outputs: the results.
      nodes: in the order of the program, those that the outputs depend on.
    """

    def __init__(self, closed: ClosedJaxpr, constants: Sequence[Any], num_learned: int):
        self._nodes: list[Node] = []
        self._open: dict[tuple[Path, int], Value] = {}
        avals = [var.aval for var in closed.jaxpr.invars]
        held = [
            Value(jnp.shape(constant), constant=constant, learned=place < num_learned)
            for place, constant in enumerate(constants)
        ]
        self.inputs = [Value(aval.shape, active=True) for aval in avals[len(constants) :]]
        self.outputs = self._run(closed, [*held, *self.inputs])
        self.nodes = self._needed()
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                value.consumers.append(node)

    def _needed(self) -> list[Node]:
        wanted: set[Node] = set()
        stack = [value.node for value in self.outputs]
        while stack:
            node = stack.pop()
            if node is not None and node not in wanted:
                wanted.add(node)
                stack.extend(value.node for value in node.inputs)
        nodes = [node for node in self._nodes if node in wanted]
        for order, node in enumerate(nodes):
            node.order = order
        return nodes

    def _run(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        consts = [Value(jnp.shape(c), constant=c) for c in closed.consts]
        return self._evaluate(closed.jaxpr, consts, inputs)

    def _evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]
    ) -> list[Value]:
        known: dict[Var, Value] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return Value(jnp.shape(atom.val), constant=atom.val)
            return known[atom]

        for eqn in jaxpr.eqns:
            results = self._apply(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name == "mark":
            return [self._mark(inputs[0], **eqn.params)]
        if name in _INLINED:
            called = eqn.params[_INLINED[name]]
            if isinstance(called, ClosedJaxpr):
                return self._run(called, inputs)
            return self._evaluate(called, [], inputs)
        if name == "scan":
            return self._scan(inputs, **eqn.params)
        if name == "cond" and getattr(inputs[0].node, "name", "") == "platform_index":
            return self._run(eqn.params["branches"][-1], inputs[1:])
        outputs = [Value(var.aval.shape) for var in eqn.outvars]
        return self._add(Node(name, inputs, outputs, eqn.params, eqn.primitive))

    def _add(self, node: Node) -> list[Value]:
        self._nodes.append(node)
        active = any(value.active for value in node.inputs)
        learned = not active and any(value.learned for value in node.inputs)
        for value in node.outputs:
            value.node, value.active, value.learned = node, active, learned
        return node.outputs

    def _mark(self, value: Value, *, kind: str, call: Call) -> Value:
        if kind == "module":
            value.modules.append(call)
            return value
        key = call.path, call.number
        if kind == "begin":
            self._open[key] = value
            return value
        if not self._open[key].active:
            return value  # made of parameters alone
        node = Node("layer", [self._open[key]], [Value(value.shape)], {}, call=call)
        return self._add(node)[0]

    def _scan(self, inputs: list[Value], **params: Any) -> list[Value]:
        body, length = params["jaxpr"], params["length"]
        num_consts, num_carry = scan_counts(params, len(inputs))
        consts = inputs[:num_consts]
        carry = inputs[num_consts : num_consts + num_carry]
        scanned = inputs[num_consts + num_carry :]
        rounds = range(length)
        collected: list[list[Value]] = []
        for index in reversed(rounds) if params["reverse"] else rounds:
            members = [self._member(value, index) for value in scanned]
            results = self._run(body, [*consts, *carry, *members])
            carry = results[:num_carry]
            collected.append(results[num_carry:])
        stacks = [
            self._add(Node("stack", list(parts), [Value((length, *parts[0].shape))], {}, _stack))[0]
            for parts in zip(*collected, strict=True)
        ]
        return [*carry, *stacks]

    def _member(self, value: Value, index: int) -> Value:
        if value.constant is not None:
            return Value(value.shape[1:], constant=value.constant[index], learned=value.learned)
        node = Node(
            "slice_member", [value], [Value(value.shape[1:])], {"index": index}, _slice_member
        )
        return self._add(node)[0]


def scan_counts(params: dict[str, Any], num_inputs: int) -> tuple[int, int]:
    """How many inputs of a scan are the same in each round, and how many are carried on."""
    if "ft_in" in params:  # JAX from 0.12 on
        consts, carry, _ = params["ft_in"].update(range(num_inputs)).unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


class _Function(NamedTuple):
    """Stands for a primitive where there is none."""

    bind: Any


_stack = _Function(lambda *parts: jnp.stack(parts))
_slice_member = _Function(lambda x, index: x[index])


def evaluate(values: Iterable[Value], known: dict[Value, Any]) -> list[Any]:
    """Computes values of a graph.

    Args:
      values: what to compute; it depends on parameters and on ``known`` only.
      known: arrays by value; what is computed on the way is added.
    """

    def array(value: Value) -> Any:
        if value.constant is not None:
            return value.constant
        if value not in known:
            node = value.node
            assert node is not None
            results = node.primitive.bind(*map(array, node.inputs), **node.params)
            several = getattr(node.primitive, "multiple_results", False)
            known.update(zip(node.outputs, results if several else [results], strict=True))
        return known[value]

    return [array(value) for value in values]


# Acts on every element alone; what it makes of several arrays is a chain where they come from one.
ELEMENTWISE = frozenset(
    {
        *("abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
        *(
            "cos",
            "div",
            "eq",
            "erf",
            "erf_inv",
            "erfc",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "ge",
            "gt",
        ),
        *("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul"),
        *("ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
        *("sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
        *("optimization_barrier",),
    }
)

# Moves elements, leaves some out or adds zeros, but computes nothing.
SHAPES = frozenset(
    {
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "gather", "pad"),
        *("reshape", "rev", "slice", "slice_member", "split", "squeeze", "stack", "transpose"),
    }
)

# Multiplies by an array: a layer, where that is learned, else a blur or an interpolation.
PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})

# Sums (from which averages are made) and maxima over places.
SUMS = frozenset({"reduce_sum", "reduce_window_sum"})
MAXIMA = frozenset({"reduce_max", "reduce_window_max", "reduce_min", "reduce_window_min"})


def source(value: Value) -> Value:
    """What an array is made of element by element: the end of a chain of elementwise operations.

    Where two such chains meet, as in a residual addition, a new one begins.
    """
    if value._source is None:
        value._source = value
        if value.node is not None and value.node.name in ELEMENTWISE:
            sources = {source(given) for given in value.node.active_inputs}
            if len(sources) == 1:
                value._source = sources.pop()
    return value._source


_AFFINE = frozenset(
    {"add", "add_any", "mul", "neg", "optimization_barrier", "stop_gradient", "sub"}
)
_IDENTITIES = frozenset({"convert_element_type", "copy", "reduce_precision"})


def is_affine(node: Node) -> bool:
    """Whether an elementwise node is affine in the only input that is active."""
    if len(node.active_inputs) != 1:
        return False
    if node.name == "div":
        return node.inputs[0].active
    return node.name in _AFFINE | _IDENTITIES


def constant_factor(node: Node) -> float:
    """By what number an affine node multiplies; NaN where that differs from place to place."""
    if node.name == "neg":
        return -1.0
    if node.name not in ("mul", "div"):
        return 1.0 if node.name in _IDENTITIES else math.nan
    (constant,) = (value for value in node.inputs if not value.active)
    numbers = np.unique(np.asarray(evaluate([constant], {})[0], np.float64))
    if len(numbers) != 1:
        return math.nan
    return float(numbers[0] if node.name == "mul" else 1.0 / numbers[0])


def summed(node: Node) -> int:
    """How many numbers each result of a node of ``SUMS`` is the sum of."""
    if node.name == "reduce_window_sum":
        return math.prod(node.params["window_dimensions"])
    return math.prod(node.inputs[0].shape) // max(math.prod(node.outputs[0].shape), 1)
