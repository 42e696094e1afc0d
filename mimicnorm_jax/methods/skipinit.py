"""SkipInit, a baseline without normalization: a residual scalar that starts at 0."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

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

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        return functools.partial(
            ScaledConv,
            scale=0.0 if site.role == "branch_end" else None,
            kernel_init=stable_normal(fan_in, centered=False, after_relu=site.after_relu),
        )
