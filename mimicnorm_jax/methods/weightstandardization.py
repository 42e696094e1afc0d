"""Weight standardization with GroupNorm, a baseline without batch statistics."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import WeightStandardizedConv, WeightStandardizedDense
from mimicnorm_jax.methods.base import Function, Method, Site, identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(Method):
    """Standardized kernels, each followed by a GroupNorm (Qiao et al. 2019).

    Dense layers between the convolutions and the classifier, and the classifier, are left
    as they are, as with BatchNorm.

    Attributes:
      groups: groups of a GroupNorm; where they do not divide the features, the greatest
        common divisor of both.
    """

    name: ClassVar[str] = "weightstandardization"

    groups: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise UserError(f"groups must be at least 1, got {self.groups}")

    def normalizes(self, site: Site) -> bool:
        return site.role not in ("hidden_dense", "classifier")

    def _types(self) -> dict[str, Any]:
        return {"dtype": self.precision.dtype, "param_dtype": self.precision.param_dtype}

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        return functools.partial(WeightStandardizedConv, use_bias=False)

    def dense(self, in_features: int, out_features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        if not self.normalizes(site):
            return super().dense(in_features, out_features, site=site, rngs=rngs)
        return WeightStandardizedDense(
            in_features, out_features, use_bias=False, rngs=rngs, **self._types()
        )

    def norm(self, features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        if not self.normalizes(site):
            return identity
        groups = math.gcd(self.groups, features)
        return nnx.GroupNorm(features, num_groups=groups, epsilon=1e-5, rngs=rngs, **self._types())
