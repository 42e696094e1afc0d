"""Makes the converted network after its plan."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimicnorm_jax.convert.graph import Path
from mimicnorm_jax.convert.layers import NormalizedLogits, Scaled, Shift, passed_on
from mimicnorm_jax.convert.plan import Layer, Plan
from mimicnorm_jax.convert.substitute import copied, substitute
from mimicnorm_jax.layers import (
    LastBN,
    ScaledConv,
    ScaledDense,
    WeightMeanConv,
    WeightMeanDense,
)
from mimicnorm_jax.layers.kernel import at_least_float32


class Built(NamedTuple):
    """A converted network.

    Attributes:
      network: the copy.
      layers: its convolutions and dense layers by the path that they had in the original.
    """

    network: nnx.Module
    layers: dict[Path, Any]


def build(model: nnx.Module, plan: Plan, *, axis_name: str | None) -> Built:
    """A copy of a network with the layers of its plan; the variances are still its own.

    Args:
      model: the network.
      plan: what becomes of its layers.
      axis_name: of the last BN.
    """
    network = copied(model)
    modules = dict(nnx.iter_modules(network))
    replacements: dict[int, nnx.Module] = {}
    evaluates = all(norm.module.use_running_average for norm in plan.norms)  # type: ignore
    for norm in plan.norms:
        if norm.reason:
            continue
        old = modules[norm.path]
        replacements[id(old)] = nnx.Sequential(passed_on) if norm.absorbed else _shift(old)
    layers: dict[Path, Any] = {}
    for layer in plan.layers:
        old = modules[layer.path]
        layers[layer.path] = old
        if layer.reason is None:
            new = layers[layer.path] = _converted_layer(old, layer)
            if layer.last_bn is not None:
                last_bn = _last_bn(new, axis_name)
                last_bn.use_running_average = evaluates
                new = NormalizedLogits(new, last_bn, averaged=layer.last_bn == "mean")
            replacements[id(old)] = new
    for path, scales in plan.scaled.items():
        old = modules[path]
        replacements[id(old)] = Scaled(old, _stacked(scales))
    substitute(network, replacements)
    return Built(network, layers)


def _stacked(scales: list[float]) -> jax.Array:
    """One scalar, or one a member of a stack."""
    return jnp.asarray(scales[0] if len(scales) == 1 else scales, jnp.float32)


def _shift(norm: Any) -> Shift:
    dtype = jnp.float32 if norm.bias is None else norm.bias[...].dtype
    return Shift(jnp.zeros(norm.mean[...].shape, dtype), axis=getattr(norm, "axis", -1))


def stack_of(layer: Layer) -> tuple[int, ...]:
    """The axes of a stack that a layer's parameters have before their own."""
    call = layer.nodes[0].call
    assert call is not None
    shape = layer.module.kernel[...].shape  # type: ignore[attr-defined]
    return tuple(shape[: len(shape) - len(call.kernel_shape)])


def _converted_layer(old: Any, layer: Layer) -> Any:
    stack = stack_of(layer)
    use_bias = layer.last_bn is None and (layer.needs_bias or old.bias is not None)
    new = _of_kind(old, layer, use_bias)
    kernel = old.kernel[...]
    if layer.centered:  # by NumPy: nothing to compile for every shape
        axes = tuple(range(len(stack), kernel.ndim - 1))
        wide = np.asarray(kernel, np.float64)
        kernel = jnp.asarray(wide - wide.mean(axes, keepdims=True), kernel.dtype)
    new.kernel = old.kernel  # the variable with its metadata
    new.kernel.set_value(kernel)
    if use_bias:
        features = kernel.shape[-1]
        if old.bias is not None:
            new.bias = old.bias
            if layer.needs_bias:  # the norm subtracted it
                new.bias[...] = jnp.zeros_like(old.bias[...])
        else:
            new.bias = nnx.Param(jnp.zeros((*stack, features), kernel.dtype))
    else:
        new.bias = None
    if layer.scales is not None:
        scales = layer.scales if len(layer.scales) > 1 else layer.scales * math.prod(stack)
        new.scale = nnx.Param(jnp.asarray(scales, kernel.dtype).reshape(stack))
    return new


def _last_bn(layer: Any, axis_name: str | None) -> LastBN:
    kernel = layer.kernel[...]
    dtype = at_least_float32(kernel.dtype)
    return LastBN(kernel.shape[-1], axis_name=axis_name, param_dtype=dtype)


def _of_kind(old: Any, layer: Layer, use_bias: bool) -> Any:
    """A layer of the kind that is wanted; its parameters are those of no stack."""
    scale = None if layer.scales is None else 1.0
    shared: dict[str, Any] = {
        "use_bias": use_bias,
        "dtype": old.dtype,
        "precision": old.precision,
        "kernel_init": nnx.initializers.zeros_init(),
        "param_dtype": old.kernel[...].dtype,
        "rngs": nnx.Rngs(0),
    }
    if isinstance(old, nnx.Linear | ScaledDense):
        if scale is None and not layer.centered:
            return nnx.Linear(old.in_features, old.out_features, **shared)
        kind = WeightMeanDense if layer.centered else ScaledDense
        return kind(old.in_features, old.out_features, scale=scale, **shared)
    if isinstance(old, ScaledConv):
        shared |= {"codec": old.codec, "differentiable": old.differentiable}
    return (WeightMeanConv if layer.centered else ScaledConv)(
        old.in_features,
        old.out_features,
        old.kernel_size,
        old.strides,
        padding=old.padding,
        kernel_dilation=old.kernel_dilation,
        feature_group_count=old.feature_group_count,
        scale=scale,
        narrow=not layer.curved,  # else the compiler would keep it twice
        preferred_element_type=old.preferred_element_type,
        **shared,
    )


def rescale(layer: Any, factor: Any) -> None:
    """Multiplies a layer's kernel, in place.

    Args:
      layer: of ``Built.layers``.
      factor: a number; of a stack one a member.
    """
    kernel = layer.kernel[...]
    factor = np.asarray(factor, np.float64)
    factor = factor.reshape(factor.shape + (1,) * (kernel.ndim - factor.ndim))
    layer.kernel.set_value(jnp.asarray(np.asarray(kernel, np.float64) * factor, kernel.dtype))
