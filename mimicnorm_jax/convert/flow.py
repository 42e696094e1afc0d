"""What feeds what in a network: questions that the rules ask of its graph."""

from __future__ import annotations

import math
from typing import NamedTuple

from flax import nnx

from mimicnorm_jax.convert.graph import (
    ELEMENTWISE,
    PRODUCTS,
    SHAPES,
    SUMS,
    Node,
    Path,
    Value,
    constant_factor,
    is_affine,
    source,
    summed,
)
from mimicnorm_jax.convert.trace import LINEAR, NORMS, Traced, is_of

_CURVED = frozenset(
    {
        *("erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "pow"),
        *("rsqrt", "sin", "cos", "sqrt", "square", "tanh"),
    }
)
_CASTS = frozenset({"convert_element_type", "copy"})


def _is_product(node: Node) -> bool:
    """Whether a node multiplies arrays of different origin."""
    return (
        node.name == "mul"
        and len(node.active_inputs) > 1
        and source(node.outputs[0]) is node.outputs[0]
    )


def _keeps_channels(node: Node) -> bool:
    """Whether what a node returns has the channels of its input as last axis, and no others."""
    if node.call is not None or len(node.active_inputs) != 1:
        return False
    given, made = node.active_inputs[0].shape, node.outputs[0].shape
    moved = node.name in SHAPES - {"reshape", "squeeze", "expand_dims"}
    return not moved and given[-1:] == made[-1:]


class LinearEnd(NamedTuple):
    """The layer of which a value is a linear function.

    Attributes:
      layer: its call.
      averaged: whether sums over places lie between.
      factor: what a number that all places have in common is multiplied by on the way; NaN where
        something is added, or the factor is not the same everywhere.
    """

    layer: Node
    averaged: bool
    factor: float


class Flow:
    """A traced network, asked.

    Args:
      traced: the network.

    Attributes:
      kept: the norms that stay; what a layer makes ends there.
    """

    def __init__(self, traced: Traced):
        self.kept: set[Path] = set()
        self._modules = traced.modules
        self._outputs = frozenset(traced.graph.outputs)
        self._calls: dict[Path, list[Node]] = {}
        for node in traced.graph.nodes:
            if node.call is not None:
                self._calls.setdefault(node.call.path, []).append(node)

    def calls_of(self, kinds: tuple[type[nnx.Module], ...]) -> dict[Path, list[Node]]:
        """The calls of layers of some kinds, by path."""
        return {p: nodes for p, nodes in self._calls.items() if is_of(self._modules[p], kinds)}

    def _is(self, node: Node, kinds: tuple[type[nnx.Module], ...]) -> bool:
        return node.call is not None and is_of(self._modules[node.call.path], kinds)

    def is_kept(self, node: Node | None) -> bool:
        """Whether a node is the call of a norm that stays."""
        return node is not None and node.call is not None and node.call.path in self.kept

    def is_linear(self, node: Node) -> bool:
        """Whether a node is a convolution or dense layer, or one that is written out."""
        if node.name not in PRODUCTS:
            return self._is(node, LINEAR)
        return len(node.active_inputs) > 1 or any(value.learned for value in node.inputs)

    def before_norm(self, value: Value) -> bool:
        """Whether a norm follows before the next layer; a gate's product hides what it gates."""
        for node in value.consumers:
            if self._is(node, NORMS):
                return True
            if node.call is not None or self.is_linear(node) or _is_product(node):
                continue
            if any(self.before_norm(result) for result in node.outputs):
                return True
        return False

    def gates_only(self, value: Value, *, bounded: bool = False) -> bool:
        """Whether a value only decides by what others are multiplied, as in squeeze-and-excitation.

        Of two factors of different origin the gate is the one that comes through a sigmoid, or that
        is the same at all places.

        Args:
          value: the value.
          bounded: whether it came through either already.
        """
        if value in self._outputs or not value.consumers:
            return False
        for node in value.consumers:
            if _is_product(node):
                if not bounded:
                    return False
                continue
            grows = node.name == "broadcast_in_dim" and math.prod(
                node.outputs[0].shape
            ) > math.prod(value.shape)
            through = grows or node.name == "logistic" or (bounded and not self.is_linear(node))
            if not all(self.gates_only(result, bounded=through) for result in node.outputs):
                return False
        return True

    def is_curved(self, value: Value) -> bool:
        """Whether a value is a product, or a curved function such as SiLU, of what layers return.

        The derivative of that keeps its own input, from which the value can be computed again.
        """
        node = value.node
        if node is None or not value.active or node.name not in ELEMENTWISE | SHAPES:
            return False
        if node.name in _CURVED or (node.name == "mul" and len(node.active_inputs) > 1):
            return True
        return len(node.active_inputs) == 1 and self.is_curved(node.active_inputs[0])

    def from_input(self, value: Value) -> bool:
        """Whether a value is an input of the network: cast, moved, scaled or shifted at most."""
        while (node := value.node) is not None:
            moved = node.name in SHAPES or (node.name in ELEMENTWISE and is_affine(node))
            if node.call is not None or not moved or len(node.active_inputs) != 1:
                return False
            value = node.active_inputs[0]
        return value.active

    def written_out(self, value: Value) -> bool:
        """Whether a value is made by a convolution or a product that is no layer of Flax."""
        while (node := value.node) is not None and node.call is None:
            if node.name in PRODUCTS:
                return self.is_linear(node)
            kept = node.name in SHAPES or (node.name in ELEMENTWISE and is_affine(node))
            if not kept or len(node.active_inputs) != 1:
                return False
            value = node.active_inputs[0]
        return False

    def is_recurrent(self, nodes: list[Node]) -> bool:
        """Whether a layer is called on what an earlier call of it made."""
        later, waiting, seen = set(nodes[1:]), list(nodes[0].outputs), set(nodes[:1])
        while waiting:
            for node in waiting.pop().consumers:
                if node in later:
                    return True
                if node not in seen:
                    seen.add(node)
                    waiting.extend(node.outputs)
        return False

    def _is_used_once(self, value: Value) -> bool:
        return len(value.consumers) == 1 and value not in self._outputs

    def fed_by(self, norm: Node) -> Node | None:
        """The layer that feeds a norm, and nothing else; None where it is something else."""
        value = norm.inputs[0]
        while value.node is not None and self._is_used_once(value):
            if value.node.call is not None:
                return value.node if self._is(value.node, LINEAR) else None
            if value.node.name not in _CASTS:
                return None
            value = value.node.inputs[0]
        return None

    def channels_of(self, value: Value) -> LinearEnd | None:
        """The layer whose channels a value has as its last axis, averaged over places at most.

        None where the value, or what it is made of, is used for something else too.
        """
        return self.linear_end(value, same_channels=True) if self._is_used_once(value) else None

    def linear_end(
        self, value: Value, *, alone: bool = True, same_channels: bool = False
    ) -> LinearEnd | None:
        """The layer of which a value is a linear (or affine) function, with no other in between.

        Args:
          value: the result.
          alone: whether all on the way must be used for this result only.
          same_channels: whether the last axis must be that of the layer's channels all the way,
            with no zeros added and no norm in between.
        """
        averaged, factor, end = False, 1.0, value
        while (node := value.node) is not None:
            if alone and value is not end and not self._is_used_once(value):
                return None
            if self._is(node, LINEAR):
                return LinearEnd(node, averaged, factor)
            if same_channels and not _keeps_channels(node):
                return None
            if self._is(node, NORMS) and not self.is_kept(node):
                pass
            elif node.call is not None or len(node.active_inputs) != 1:
                return None
            elif node.name in SUMS:
                averaged, factor = True, factor * summed(node)
            elif node.name in ELEMENTWISE and is_affine(node):
                factor *= constant_factor(node)
            elif node.name in PRODUCTS and not self.is_linear(node):
                averaged, factor = True, math.nan
            elif node.name not in SHAPES:
                return None
            value = node.active_inputs[0]
        return None
