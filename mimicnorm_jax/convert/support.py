"""Which layers can be converted."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from mimicnorm_jax.layers import ScaledConv, ScaledDense


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
    # What these leave of a kernel differs from output to output, and so does its fan-in.
    if getattr(module, "mask", None) is not None:
        return "its kernel has a mask"
    dilation = getattr(module, "input_dilation", None)
    if dilation is not None and any(step != 1 for step in np.ravel(dilation)):
        return "its input is dilated"
    if kind in (ScaledConv, ScaledDense, nnx.Linear):
        return None
    if isinstance(module, nnx.ConvTranspose):
        return "transposed convolutions are not converted"
    if kind is not nnx.Conv:
        return f"{kind_of(module)} is no layer that this package has with weight mean"
    assert isinstance(module, nnx.Conv)
    if module.conv_general_dilated is not jax.lax.conv_general_dilated:
        return "it convolves by a function of its own"
    return None
