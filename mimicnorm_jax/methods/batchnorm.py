"""BatchNorm after every convolution: what MimicNorm replaces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

from flax import nnx

from mimicnorm_jax.errors import unknown
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.methods.base import Function, Method, Site, identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(Method):
    """BatchNorm after every convolution (Ioffe and Szegedy 2015): ``ShiftedBatchNorm``.

    Attributes:
      bn_sync: ``"local"``: each device normalizes by its own part of the batch, as data
        parallel training commonly does; ``"global"``: by the whole batch.
      conv_bias: keep the convolutions' biases, as the published VGGs do.
      frozen: normalize by running averages that, as scale and bias, stay what they are: for
        fine-tuning in little memory, at any batch size.
    """

    name: ClassVar[str] = "batchnorm"

    bn_sync: Literal["local", "global"] = "local"
    conv_bias: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bn_sync not in ("local", "global"):
            raise unknown("bn_sync", self.bn_sync, ("local", "global"))

    @property
    def couples_examples(self) -> bool:
        return not self.frozen

    def min_batch_size(self, num_devices: int) -> int:
        if self.frozen:
            return 1
        return 2 * num_devices if self.bn_sync == "local" else 2

    @property
    def depends_on_devices(self) -> bool:
        return self.bn_sync == "local" and not self.frozen

    def normalizes(self, site: Site) -> bool:
        return not self.frozen and _has_norm(site)

    def use_bias(self, site: Site) -> bool:
        return self.conv_bias or not _has_norm(site)

    # What a norm puts out is computed again from its input, which it keeps anyway.

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        return functools.partial(super().conv_layer(fan_in, site), narrow=self.frozen)

    def norm(self, features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        if not _has_norm(site):
            return identity
        return ShiftedBatchNorm(
            features,
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            axis_name=self.axis_name if self.bn_sync == "global" else None,
            frozen=self.frozen,
            rngs=rngs,
        )


def _has_norm(site: Site) -> bool:
    return site.role not in ("hidden_dense", "classifier")
