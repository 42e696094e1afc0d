"""What is the same on all devices of a ``shard_map``, and what may differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax


def axes_of(x: jax.Array) -> frozenset[str]:
    """Names of the mesh axes over whose devices an array may differ."""
    kind: Any = jax.typeof(x)
    # JAX 0.8 has the first, 0.10 the second
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def as_varying(tree: Any, axes: Iterable[str]) -> Any:
    """Arrays as ones that may differ over some axes.

    Differentiating the result gives each device its own gradient, and differentiating this
    function sums those of all devices.
    """

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in axes_of(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
