"""MimicNorm and its two ablations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

from flax import nnx

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers import (
    LastBN,
    ScaledConv,
    ScaledDense,
    WeightMean,
    WeightMeanConv,
    WeightMeanDense,
    stable_normal,
)
from mimicnorm_jax.methods.base import Function, Method, Site

Center = Literal["fan_in", "not_depthwise"]
MIN_FAN_IN = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class MimicNorm(Method):
    """Weight mean, a residual scalar and the last BN (Fei et al. 2020, Section 4).

    The defaults are the paper's.

    Attributes:
      weight_mean: ``"reparameterized"``: the forward pass centres; or ``"projected"``: the
        optimizer does (Appendix C); see ``WeightMeanConv``.
      center: which convolutions are centred. Section 4 leaves out depthwise ones, whose
        channels have too few weights (9). ``"fan_in"``: those with a fan-in above
        ``min_fan_in``, which also leaves out the 3-channel 3x3 stem (27) and narrow 1x1
        convolutions; its authors' rule for CIFAR. ``"not_depthwise"``: all others; their
        rule for ImageNet.
      min_fan_in: with ``center="fan_in"``: a layer is centred if its fan-in is above this
        (unset: 50, the number of its authors' code).
      center_dense: whether the dense layers between convolutions and classifier are
        centred too, as in the networks of Section 3; the experiments of Section 5 centre
        convolutions only. (SqueezeNet's classifier is a convolution.)
      residual_init: initial value of the scalar at the end of the l-th branch:
        ``"inverse_sqrt"`` 1/sqrt(l) (the paper), ``"inverse"`` 1/l (its authors' code).
      gain: factor of the initial standard deviation of layers whose input is not
        rectified: the stem, and 1x1 convolutions after depthwise ones. Theorem 3 is about
        rectified inputs and says nothing of them; 1 keeps the second moment of an input of
        mean 0. It is also what its authors' code comes to after the depthwise convolutions
        of ShuffleNetV2: these start at a quarter of our variance (2/36: a fan-in of at
        least 4 channels), which cancels the scalars 1.2 and 1.2^2 and the variance 2/n
        of its 1x1 convolutions (second moment after a branch's last 1x1 convolution over
        the first's: 0.99 there, 0.98 here).
    """

    name: ClassVar[str] = "mimicnorm"
    has_weight_mean: ClassVar[bool] = True
    has_last_bn: ClassVar[bool] = True

    weight_mean: WeightMean = "reparameterized"
    center: Center = "fan_in"
    min_fan_in: int | None = None
    center_dense: bool = False
    residual_init: Literal["inverse_sqrt", "inverse"] = "inverse_sqrt"
    gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_mean not in get_args(WeightMean):
            raise unknown("weight_mean", self.weight_mean, get_args(WeightMean))
        if self.residual_init not in ("inverse_sqrt", "inverse"):
            raise unknown("residual_init", self.residual_init, ("inverse_sqrt", "inverse"))
        if self.center not in get_args(Center):
            raise unknown("center", self.center, get_args(Center))
        if self.min_fan_in is not None:
            if self.center != "fan_in":
                raise UserError(
                    f"min_fan_in = {self.min_fan_in} does not go with center = {self.center!r}; "
                    "allowed: center = 'fan_in'"
                )
            if self.min_fan_in < 1:
                raise UserError(f"min_fan_in must be at least 1, got {self.min_fan_in}")
        if not self.gain > 0:
            raise UserError(f"gain must be positive, got {self.gain}")

    def centers(self, fan_in: int, site: Site) -> bool:
        """Whether the layer at ``site`` is centred."""
        if not self.has_weight_mean:
            return False
        if site.role == "classifier" and not site.convolution:
            return False
        if site.role == "hidden_dense" and not self.center_dense:
            return False
        if self.center == "not_depthwise":
            return site.role != "depthwise"
        return fan_in > (MIN_FAN_IN if self.min_fan_in is None else self.min_fan_in)

    def residual_scale(self, site: Site) -> float | None:
        """Initial value of the scalar folded into the layer at ``site``, if any."""
        if site.role != "branch_end" or site.branch is None:
            return None
        power = 0.5 if self.residual_init == "inverse_sqrt" else 1.0
        return float(site.branch.index**-power)

    def use_bias(self, site: Site) -> bool:
        # The last BN subtracts whatever the classifier's bias adds.
        return not (site.role == "classifier" and self.has_last_bn)

    def _layer_options(self, fan_in: int, site: Site) -> dict[str, Any]:
        centered = self.centers(fan_in, site)
        options: dict[str, Any] = {
            "use_bias": self.use_bias(site),
            "scale": self.residual_scale(site),
            "kernel_init": stable_normal(
                fan_in,
                centered=centered,
                after_relu=site.after_relu,
                gain=1.0 if site.after_relu else self.gain,
            ),
        }
        return options | ({"weight_mean": self.weight_mean} if centered else {})

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        layer = WeightMeanConv if self.centers(fan_in, site) else ScaledConv
        return functools.partial(layer, **self._layer_options(fan_in, site))

    def dense(self, in_features: int, out_features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        layer = WeightMeanDense if self.centers(in_features, site) else ScaledDense
        return layer(
            in_features,
            out_features,
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
            **self._layer_options(in_features, site),
        )

    def min_batch_size(self, num_devices: int) -> int:
        return 2 if self.has_last_bn else 1

    def head(self, num_classes: int) -> Function:
        if not self.has_last_bn:
            return super().head(num_classes)
        return LastBN(num_classes, axis_name=self.axis_name, param_dtype=self.precision.param_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMeanOnly(MimicNorm):
    """MimicNorm without the last BN: an ablation of the paper (Section 5)."""

    name: ClassVar[str] = "weightmean"
    has_last_bn: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastBNOnly(MimicNorm):
    """MimicNorm without weight mean: an ablation of the paper (Section 5)."""

    name: ClassVar[str] = "lastbn"
    has_weight_mean: ClassVar[bool] = False
