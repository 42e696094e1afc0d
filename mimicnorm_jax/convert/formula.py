"""What theory expects of the values of a network: their mean and second moment, by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.convert.graph import (
    ELEMENTWISE,
    MAXIMA,
    PRODUCTS,
    SHAPES,
    SUMS,
    Graph,
    Node,
    Value,
    evaluate,
    source,
    summed,
)
from mimicnorm_jax.layers.activation import IDENTITY, Moments, activation_moments

_CHOICES = frozenset({"max", "min", "select_n"})
_ADDITIONS = frozenset({"add", "add_any"})
_RESHAPED = frozenset({"broadcast_in_dim", "reshape", "expand_dims", "squeeze"})


def _number(value: Value) -> Any:
    """What stands at every place of a constant; the mean where they differ (PReLU's slopes)."""
    if value.constant is None and value.node is not None and value.node.name in _RESHAPED:
        return _number(value.node.inputs[0])
    array = np.asarray(evaluate([value], {})[0])
    if array.dtype.kind == "f" or array.dtype == jnp.bfloat16:
        return np.float32(array.astype(np.float32).mean())
    return array.ravel()[0]


def activation_function(value: Value) -> Callable[[jax.Array], jax.Array]:
    """What an array is of its source, element by element, as a function of numbers ``(N,)``."""
    start = source(value)

    def phi(z: jax.Array) -> jax.Array:
        known: dict[Value, jax.Array] = {start: z}

        def compute(value: Value) -> jax.Array:
            if value in known:
                return known[value]
            if not value.active:
                return jnp.broadcast_to(_number(value), z.shape)
            node = value.node
            assert node is not None
            given = [compute(part) for part in node.inputs]
            if node.name == "convert_element_type" and jnp.issubdtype(
                node.params["new_dtype"], jnp.floating
            ):
                results = [given[0].astype(z.dtype)]
            else:
                made = node.primitive.bind(*given, **node.params)
                results = made if node.primitive.multiple_results else [made]
            known.update(zip(node.outputs, results, strict=True))
            return known[value]

        return compute(value)

    return phi


def expected_moments(graph: Graph) -> dict[Value, Moments]:
    """Mean and second moment of every value, as far as theory goes.

    Layers, norms, residual additions and the network's input put out standard Gaussians; an
    activation makes of them what quadrature says; moving, averaging and taking maxima is not
    seen; channels side by side are mixed; a product is one of independent numbers.
    """
    expected: dict[Value, Moments] = dict.fromkeys(graph.inputs, IDENTITY)
    for node in graph.nodes:
        for value in node.outputs:
            if value.active:
                expected[value] = _of(node, value, expected)
    return expected


def _of(node: Node, value: Value, expected: dict[Value, Moments]) -> Moments:
    given = node.active_inputs
    if node.name in ELEMENTWISE:
        start = source(value)
        if start is not value:
            return _activated(value, expected[start])
        if node.name == "mul":
            a, b = (expected[factor] for factor in given)
            return Moments(a.mean * b.mean, a.second * b.second, 1.0)
        if node.name in _ADDITIONS and all(expected[term].mean > 0 for term in given):
            return _mixed([(1, expected[term]) for term in given])  # of rectified values
        if node.name in _CHOICES:  # a maximum over places, written as one of slices
            return expected[given[0]]
        return IDENTITY
    if node.name in SHAPES:
        return _mixed([(np.prod(part.shape), expected[part]) for part in given])
    if node.name in SUMS:  # an average is one, divided later
        return _scaled(expected[given[0]], summed(node))
    fixed = node.name in PRODUCTS and not any(part.learned for part in node.inputs)
    if node.name in MAXIMA or (fixed and len(given) == 1):  # a blur, an interpolation
        return expected[given[0]]
    return IDENTITY


def _activated(value: Value, before: Moments) -> Moments:
    phi = activation_function(value)
    deviation = float(np.sqrt(max(before.variance, 0.0)))
    try:
        return activation_moments(lambda z: phi(before.mean + deviation * z))
    except (ValueError, TypeError):
        return IDENTITY


def _scaled(moments: Moments, factor: float) -> Moments:
    return Moments(moments.mean * factor, *(part * factor**2 for part in moments[1:]))


def _mixed(parts: list[tuple[Any, Moments]]) -> Moments:
    total = float(sum(size for size, _ in parts))
    mean, second, slope = (
        float(sum(size * moments[place] for size, moments in parts)) / total for place in range(3)
    )
    return Moments(mean, second, slope)
