"""SkipInit, a baseline without normalization: a residual scalar that starts at 0."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from flax import nnx

from mimicnorm_jax.layers import ScaledConv, stable_normal
from mimicnorm_jax.methods.base import Function, Method, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipInit(Method):
    """He initialization, biases, and a scalar from 0 at the end of each residual branch.

    De and Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity
    Function in Deep Networks", Section 4. The scalar is folded into the branch's last
    convolution.
    """

    name: ClassVar[str] = "skipinit"
    needs_branches: ClassVar[bool] = True

    def conv(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        site: Site,
        strides: int = 1,
        padding: int = 0,
        feature_group_count: int = 1,
        rngs: nnx.Rngs,
    ) -> Function:
        fan_in = math.prod(kernel_size) * in_features // feature_group_count
        return ScaledConv(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            feature_group_count=feature_group_count,
            scale=0.0 if site.role == "branch_end" else None,
            kernel_init=stable_normal(fan_in, centered=False, after_relu=site.after_relu),
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
        )
