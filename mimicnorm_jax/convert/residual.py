"""Residual additions of a network: what the shortcut is, what the branches, and the how-manieth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mimicnorm_jax.convert.graph import Graph, Node, Value, source


@dataclasses.dataclass(eq=False)
class Join:
    """A residual addition.

    Attributes:
      node: the addition; of several in a row the last.
      shortcut: the summand with the fewest layers behind the fork.
      branches: the other summands.
      index: l, counted from 1 along the trunk.
    """

    node: Node
    shortcut: Value
    branches: list[Value]
    index: int = 0


_SUMS = frozenset({"add", "add_any", "sub"})


def _is_sum(node: Node | None) -> bool:
    """Whether a node adds arrays of different origin."""
    return (
        node is not None
        and node.name in _SUMS
        and len(node.active_inputs) > 1
        and source(node.outputs[0]) is node.outputs[0]
    )


def _summands(node: Node) -> list[Value]:
    """What is added, where ``a + b + c`` is one sum of three."""
    terms: list[Value] = []
    for value in node.active_inputs:
        if _is_sum(value.node) and len(value.consumers) == 1:
            assert value.node is not None
            terms += _summands(value.node)
        else:
            terms.append(value)
    return terms


def residual_joins(
    graph: Graph, is_linear: Callable[[Node], bool]
) -> tuple[list[Join], list[Node]]:
    """Finds the residual additions.

    In one, all summands come from one value (the fork), and one of them, the shortcut, has fewer
    layers behind it than each of the others.

    Args:
      graph: of the network.
      is_linear: whether a node is a convolution or dense layer.

    Returns:
      The residual additions in the order of the network, and the sums of parallel layers, which
      are not such.
    """
    values = [*graph.inputs, *(v for node in graph.nodes for v in node.outputs if v.active)]
    ancestors: dict[Value, int] = {}  # as bits, by number; each value is its own ancestor
    for number, value in enumerate(values):
        bits = 1 << number
        for given in value.node.active_inputs if value.node else ():
            bits |= ancestors[given]
        ancestors[value] = bits

    def layers_behind(fork: int, value: Value) -> int:
        """Most layers on a way from the fork."""
        reached: dict[Value, int] = {}

        def visit(value: Value) -> int:
            if value not in reached:
                node = value.node
                ways = [
                    visit(given)
                    for given in (node.active_inputs if node else ())
                    if ancestors[given] >> fork & 1
                ]
                layer = node is not None and is_linear(node)
                reached[value] = max(ways) + layer if ways else 0
            return reached[value]

        return visit(value)

    parts = {
        id(value.node)
        for node in graph.nodes
        if _is_sum(node)
        for value in node.active_inputs
        if _is_sum(value.node) and len(value.consumers) == 1
    }
    joins: list[Join] = []
    parallel: list[Node] = []
    for node in graph.nodes:
        if not _is_sum(node) or id(node) in parts:
            continue
        terms = _summands(node)
        common = -1
        for term in terms:
            common &= ancestors[term]
        if not common:
            continue
        fork = common.bit_length() - 1
        depths = [layers_behind(fork, term) for term in terms]
        if max(depths) == 0:
            continue
        least = min(depths)
        if depths.count(least) > 1:
            parallel.append(node)
            continue
        shortcut = terms[depths.index(least)]
        joins.append(Join(node, shortcut, [term for term in terms if term is not shortcut]))
    _count(graph, joins)
    return joins, parallel


def _count(graph: Graph, joins: list[Join]) -> None:
    """Numbers the additions along the trunk: those inside a branch begin at their outer trunk."""
    by_node = {join.node: join for join in joins}
    passed: dict[Value, int] = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        join = by_node.get(node)
        if join is not None:
            join.index = passed[join.shortcut] + 1
        count = (
            max((passed[value] for value in node.active_inputs), default=0)
            if join is None
            else join.index
        )
        passed.update(dict.fromkeys(node.outputs, count))
