"""What normalizes a network: every method is an answer to the same requests.

A network in ``models/`` asks its ``Method`` for convolutions, dense layers, norms,
activations, residual merges and the head, and says of each layer where it stands
(``Site``). Whatever a method needs beyond that, such as Fixup's scalar biases or
MimicNorm's residual scalar, is inside the modules it answers with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mimicnorm_jax.errors import unknown
from mimicnorm_jax.methods.base import Branch, Function, Method, Site
from mimicnorm_jax.methods.batchnorm import BatchNorm
from mimicnorm_jax.methods.fixup import Fixup
from mimicnorm_jax.methods.mimicnorm import LastBNOnly, MimicNorm, WeightMeanOnly
from mimicnorm_jax.methods.skipinit import SkipInit
from mimicnorm_jax.methods.weightstandardization import WeightStandardization

__all__ = [
    "METHODS",
    "BatchNorm",
    "Branch",
    "Fixup",
    "Function",
    "LastBNOnly",
    "Method",
    "MimicNorm",
    "Site",
    "SkipInit",
    "WeightMeanOnly",
    "WeightStandardization",
    "create_method",
]

#: The methods, as classes, by name.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(MimicNorm, BatchNorm, Method, WeightMeanOnly, LastBNOnly),
        *(Fixup, SkipInit, WeightStandardization),
    )
}


def create_method(name: str, **options: Any) -> Method:
    """Creates a method by name.

    Args:
      name: one of ``METHODS``.
      **options: the method's attributes, such as ``bn_sync`` of ``"batchnorm"``.

    Returns:
      The method, for ``create_model``.

    Raises:
      UserError: an unknown name, an option that the method does not have, or a value
        that the option does not take.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    allowed = [field.name for field in dataclasses.fields(METHODS[name])]
    for option in options:
        if option not in allowed:
            raise unknown(f"option of method {name!r}", option, allowed)
    return METHODS[name](**options)
