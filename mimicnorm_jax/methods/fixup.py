"""Fixup, the paper's baseline without normalization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.layers import ScaledConv, stable_normal
from mimicnorm_jax.methods.base import Function, Method, Site


class FixupConv(nnx.Module):
    """``scale * conv(x + bias_in) + bias_out`` with scalar biases and multiplier."""

    def __init__(
        self,
        conv: ScaledConv,
        *,
        bias_in: bool,
        bias_out: bool,
        param_dtype: jnp.dtype,
    ):
        self.conv = conv
        self.bias_in = nnx.Param(jnp.zeros((), param_dtype)) if bias_in else None
        self.bias_out = nnx.Param(jnp.zeros((), param_dtype)) if bias_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x, offset=None if self.bias_in is None else self.bias_in[...])
        return y if self.bias_out is None else y + self.bias_out[...].astype(y.dtype)


class FixupDense(nnx.Module):
    """``dense(x + bias_in)`` with a scalar bias before the classifier."""

    def __init__(self, dense: nnx.Linear, param_dtype: jnp.dtype):
        self.dense = dense
        self.bias_in = nnx.Param(jnp.zeros((), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x + self.bias_in[...].astype(x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixup(Method):
    """Fixup (Zhang, Dauphin and Ma 2019): trains residual networks by initialization.

    Its rule: (1) the classifier and the last layer of each branch start at 0; (2) the
    other layers of a branch start at He's scaled by L^(-1/(2m-2)); (3) a scalar bias
    before each convolution, dense layer and activation, and one scalar multiplier a
    branch. Its authors train the scalars at a tenth of the rate; at the full rate a
    ResNet-20 with learning rate 0.1 does not learn the demo.
    """

    name: ClassVar[str] = "fixup"
    needs_branches: ClassVar[bool] = True

    scalar_rate: float = 0.1

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        def create(*args: Any, **kwargs: Any) -> Function:
            conv = ScaledConv(
                *args,
                use_bias=False,
                scale=1.0 if site.role == "branch_end" else None,
                kernel_init=self._kernel_init(fan_in, site),
                **kwargs,
            )
            return FixupConv(
                conv,
                bias_in=site.role != "stem",
                bias_out=site.role != "shortcut",
                param_dtype=self.precision.param_dtype,
            )

        return create

    def _kernel_init(self, fan_in: int, site: Site) -> Callable[..., jax.Array]:
        if site.role == "branch_end":
            return nnx.initializers.zeros_init()
        he = stable_normal(fan_in, centered=False, after_relu=site.after_relu)
        if site.branch is None or site.role == "shortcut":
            return he
        factor = site.branch.count ** (-1.0 / (2 * site.branch.layers - 2))

        def scaled_he(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            return factor * he(key, shape, dtype)

        return scaled_he

    def dense(self, in_features: int, out_features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        if site.role != "classifier":
            return super().dense(in_features, out_features, site=site, rngs=rngs)
        classifier = nnx.Linear(
            in_features,
            out_features,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
        )
        return FixupDense(classifier, self.precision.param_dtype)
