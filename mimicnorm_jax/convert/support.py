"""Which layers can be converted."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from mimicnorm_jax.layers import ScaledConv, ScaledDense

_DEFAULTS: dict[str, Any] = {"mask": None, "preferred_element_type": None, "input_dilation": 1}


def kind_of(layer: nnx.Module) -> str:
    """The name of a layer's class."""
    return str(getattr(layer, "kind_name", type(layer).__name__))


def unsupported(module: nnx.Module, ndim: int) -> str | None:
    """Why a layer stays as it was; None where it can be converted.

    Args:
      module: the layer.
      ndim: axes of its input.
    """
    kind = type(module)
    size = getattr(module, "kernel_size", None)
    if kind in (ScaledConv, nnx.Conv) and size is not None and ndim != len(size) + 2:
        return f"its kernel_size {tuple(size)} does not cover the {ndim - 2} axes of its input"
    if kind in (ScaledConv, ScaledDense, nnx.Linear):
        return None
    if kind is not nnx.Conv:
        return f"{kind_of(module)} is no layer that this package has with weight mean"
    assert isinstance(module, nnx.Conv)
    for option, usual in _DEFAULTS.items():
        given = getattr(module, option, usual)
        if given is None or given is usual:
            continue
        steps = (given,) if isinstance(given, int) else given
        if option != "input_dilation" or any(step != 1 for step in steps):
            return f"WeightMeanConv has no {option}"
    if isinstance(module.padding, str) and module.padding.upper() not in ("SAME", "VALID"):
        return f"WeightMeanConv has no padding {module.padding!r}"
    if module.conv_general_dilated is not jax.lax.conv_general_dilated:
        return "it convolves by a function of its own"
    return None
