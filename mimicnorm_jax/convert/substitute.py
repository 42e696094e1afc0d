"""A copy of a network, and other modules in the place of some of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from flax import nnx


def copied(model: nnx.Module) -> nnx.Module:
    """A copy that computes the same.

    ``nnx.clone`` sorts attributes by name, with them the entries of an ``nnx.Dict``: a network that
    concatenates what they return would have its channels in another order.
    """
    copy = nnx.clone(model)
    copies = dict(nnx.iter_modules(copy))
    for path, module in nnx.iter_modules(model):
        attributes = vars(copies[path])
        attributes.update({name: attributes.pop(name) for name in list(vars(module))})
    return copy


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
                attributes: dict[Any, Any] = vars(value)
                for name, part in list(attributes.items()):
                    new = part if str(name).startswith("_pytree__") else visit(part)
                    if new is part:
                        continue
                    if isinstance(name, int):  # of a list, in older versions of Flax
                        cast("Any", value)[name] = new
                    else:
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
