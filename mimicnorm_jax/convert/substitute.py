"""Puts other modules in the place of some modules of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx


def substitute(root: nnx.Module, replacements: Mapping[int, nnx.Module]) -> None:
    """Replaces modules wherever a network holds them: in attributes, lists, dictionaries, tuples.

    Args:
      root: the network, changed in place.
      replacements: the new module by ``id`` of the old one. A new one may hold its old one.
    """
    seen: set[int] = set()

    def visit(value: Any) -> Any:
        if isinstance(value, nnx.Module):
            if id(value) not in seen:
                seen.add(id(value))
                for name, part in list(vars(value).items()):
                    new = part if name.startswith("_pytree__") else visit(part)
                    if new is not part:
                        setattr(value, name, new)
            return replacements.get(id(value), value)
        if type(value) is list:
            value[:] = [visit(part) for part in value]
        elif type(value) is dict:
            value.update({key: visit(part) for key, part in value.items()})
        elif isinstance(value, tuple):
            parts = [visit(part) for part in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    visit(root)
