"""The requests a network makes of its method, and the answers without normalization."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers import ScaledConv, stable_normal
from mimicnorm_jax.layers.relu import Relu, relu
from mimicnorm_jax.layers.remat import REMATS, Remat, Runner
from mimicnorm_jax.layers.storage import STORAGES, ActivationStorage, codec_of
from mimicnorm_jax.precision import FLOAT32, Precision

Role = Literal["stem", "inner", "branch_end", "shortcut", "depthwise", "hidden_dense", "classifier"]
Function = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Branch:
    """The residual branch a layer belongs to.

    Attributes:
      index: l, counted from 1 over the whole network.
      count: L, the number of residual blocks of the network.
      layers: m, the number of weight layers in the branch.
    """

    index: int
    count: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a layer stands in its network.

    Attributes:
      role: ``stem`` (first layer), ``inner``, ``branch_end`` (last layer of a residual
        branch), ``shortcut`` (projection), ``depthwise``, ``hidden_dense`` (dense layers
        between the convolutions and the classifier), ``classifier``.
      after_relu: whether the layer's input is rectified.
      branch: the residual branch, where there is one.
      convolution: whether the classifier is published as a convolution before the average
        over the image, though computed as a dense layer after it.
    """

    role: Role
    after_relu: bool = True
    branch: Branch | None = None
    convolution: bool = False


def identity(x: jax.Array) -> jax.Array:
    """Returns its input: the norm of a network without norms."""
    return x


def add(shortcut: jax.Array, branch: jax.Array) -> jax.Array:
    """The residual merge."""
    return shortcut + branch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """No normalization: He initialization (He et al. 2015) and biases, nothing else.

    The base of all methods; a subclass overrides what it answers differently.

    Attributes:
      precision: number types of the layers; ``create_model`` sets it.
      axis_name: mapped axis over which batch statistics are averaged; None where the
        model is used outside ``shard_map``, ``pmap`` and ``vmap``.
      scalar_rate: learning rate of scalar parameters, as a multiple of the others'.
      activation_storage: how convolutions and activations keep what their backward pass needs:
        ``"full"``, or in ``"int8"`` or ``"int4"``, see ``mimicnorm_jax.layers.storage``.
      remat: what the backward pass computes again, see ``mimicnorm_jax.layers.remat``.
    """

    name: ClassVar[str] = "nonorm"
    needs_branches: ClassVar[bool] = False

    precision: Precision = FLOAT32
    axis_name: str | None = None
    scalar_rate: float = 1.0
    activation_storage: ActivationStorage = "full"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("activation_storage", STORAGES), ("remat", REMATS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if not self.scalar_rate > 0:
            raise UserError(f"scalar_rate must be positive, got {self.scalar_rate}")

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
        """A convolution of ``(B, H, W, in_features)``.

        Args:
          in_features, out_features, kernel_size, strides, feature_group_count: as for
            ``nnx.Conv``.
          site: where it stands in the network.
          padding: zeros added on each side of both spatial axes.
          rngs: for the initial values.
        """
        fan_in = math.prod(kernel_size) * in_features // feature_group_count
        codec = codec_of(self.activation_storage, rectified=site.after_relu)
        return self.conv_layer(fan_in, site)(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            feature_group_count=feature_group_count,
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
            **({} if codec is None else {"codec": codec}),
        )

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        """The kind of convolution at ``site``: what makes it, given ``ScaledConv``'s arguments.

        Args:
          fan_in: number of weights of one output channel.
          site: where the convolution stands in the network.
        """
        return functools.partial(
            ScaledConv,
            use_bias=self.use_bias(site),
            kernel_init=stable_normal(fan_in, centered=False, after_relu=site.after_relu),
        )

    def dense(self, in_features: int, out_features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        """A dense layer on ``(B, in_features)``; arguments as for ``conv``."""
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=self.use_bias(site),
            kernel_init=stable_normal(in_features, centered=False, after_relu=site.after_relu),
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
        )

    def use_bias(self, site: Site) -> bool:
        """Whether the layer at ``site`` has a bias; a method with norms says where not."""
        return True

    def norm(self, features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        """What follows the layer at ``site``, before its activation."""
        return identity

    def activation(self, *, site: Site) -> Function:
        """The nonlinearity after the layer (or merge) at ``site``."""
        codec = codec_of(self.activation_storage, rectified=True)
        if codec is not None:
            return Relu(codec.bits)
        return Relu(normalized=True) if self.normalizes(site) else relu

    def normalizes(self, site: Site) -> bool:
        """Whether ``norm`` at ``site`` is a normalization; a method with norms says where.

        The activation after one keeps less for the backward pass: the norm keeps its own input,
        from which the rest can be computed again.
        """
        return False

    def merge(self, *, branch: Branch) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """How ``(shortcut, branch)`` become the input of the block's last activation."""
        return add

    @property
    def run(self) -> Runner:
        """What passes ``(block, x)`` through a block, more of which may be computed twice."""
        return Runner(self.remat)

    @property
    def couples_examples(self) -> bool:
        """Whether what an example becomes before the head depends on the others of its batch."""
        return False

    def min_batch_size(self, num_devices: int) -> int:
        """Fewest examples in a global batch with which training makes sense.

        A batch statistic of a single example leaves nothing of it.
        """
        return 1

    @property
    def depends_on_devices(self) -> bool:
        """Whether the result depends on how many devices share a batch."""
        return False

    def head(self, num_classes: int) -> Function:
        """What follows the classifier; the result is in at least float32."""
        return Upcast(self.precision.param_dtype)


class Upcast(nnx.Module):
    """Loss and metrics are computed in at least float32 whatever the layers compute in."""

    def __init__(self, dtype: jnp.dtype):
        self.dtype = dtype

    def __call__(self, logits: jax.Array) -> jax.Array:
        return logits.astype(self.dtype)
