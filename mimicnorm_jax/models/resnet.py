"""ResNets (He et al. 2016): the ImageNet family, and the thin ones for CIFAR.

The stride of a bottleneck is in its 3x3 convolution, as in the widely used
implementations whose parameter counts and accuracies are quoted ("v1.5").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from mimicnorm_jax.errors import unknown
from mimicnorm_jax.methods import Branch, Method, Site
from mimicnorm_jax.models.channels import identity_shortcut
from mimicnorm_jax.models.pooling import Window, global_average_pool
from mimicnorm_jax.models.stem import check_image_size, resolve_stem
from mimicnorm_jax.models.unit import ConvUnit

SHORTCUTS = ("auto", "identity", "projection")


class Variant(NamedTuple):
    """One member of the family.

    Attributes:
      blocks: residual blocks in each stage.
      features: features of each stage, before a bottleneck's expansion.
      bottleneck: three convolutions (1x1, 3x3, 1x1) a branch instead of two 3x3.
      shortcut: ``projection``: a 1x1 convolution where the shape changes (option B);
        ``identity``: subsampling and zero channels (option A).
      stem: ``auto`` or ``small``.
    """

    blocks: tuple[int, ...]
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    shortcut: str = "projection"
    stem: str = "auto"


def _thin(depth: int) -> Variant:
    blocks = (depth - 2) // 6
    return Variant((blocks,) * 3, (16, 32, 64), shortcut="identity", stem="small")


VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2)),
    "resnet34": Variant((3, 4, 6, 3)),
    "resnet50": Variant((3, 4, 6, 3), bottleneck=True),
    "resnet101": Variant((3, 4, 23, 3), bottleneck=True),
    "resnet152": Variant((3, 8, 36, 3), bottleneck=True),
    **{f"resnet{depth}": _thin(depth) for depth in (8, 20, 32, 44, 56, 110)},
}


class Block(nnx.Module):
    """A residual block: ``activation(merge(shortcut(x), branch(x)))``.

    Args:
      method: what normalizes the network.
      in_features: channels of the input.
      features: channels inside the branch.
      strides: step of the block.
      bottleneck: see ``Variant``.
      projection: whether a changed shape is met by a convolution.
      branch: index of this block among all blocks.
      rngs: for the initial values.
    """

    def __init__(
        self,
        method: Method,
        in_features: int,
        features: int,
        *,
        strides: int,
        bottleneck: bool,
        projection: bool,
        branch: Branch,
        rngs: nnx.Rngs,
    ):
        out_features = features * (4 if bottleneck else 1)
        inner = Site("inner", branch=branch)
        end = Site("branch_end", branch=branch)
        # (kernel size, stride, output features) of each layer of the branch
        layers = (
            [(1, 1, features), (3, strides, features), (1, 1, out_features)]
            if bottleneck
            else [(3, strides, features), (3, 1, features)]
        )
        self.branch = nnx.List[ConvUnit]([])
        branch_features = in_features
        for index, (size, step, out) in enumerate(layers):
            last = index == len(layers) - 1
            self.branch.append(
                ConvUnit(
                    method,
                    branch_features,
                    out,
                    (size, size),
                    site=end if last else inner,
                    strides=step,
                    padding=size // 2,
                    activate=not last,
                    rngs=rngs,
                )
            )
            branch_features = out
        self.changes_shape = strides != 1 or in_features != out_features
        self.projection = (
            ConvUnit(
                method,
                in_features,
                out_features,
                (1, 1),
                site=Site("shortcut", branch=branch),
                strides=strides,
                activate=False,
                rngs=rngs,
            )
            if self.changes_shape and projection
            else None
        )
        self.strides = strides
        self.out_features = out_features
        self.merge = method.merge(branch=branch)
        self.activation = method.activation(site=end)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, in_features)`` to ``(B, H / strides, W / strides, out)``."""
        shortcut = x
        if self.projection is not None:
            shortcut = self.projection(x)
        elif self.changes_shape:
            shortcut = identity_shortcut(x, strides=self.strides, features=self.out_features)
        for unit in self.branch:
            x = unit(x)
        return self.activation(self.merge(shortcut, x))


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, global average pool, classifier.

    Args:
      variant: which member of the family.
      method: what normalizes the network.
      num_classes: features of the last layer.
      image_size: height and width of the input.
      channels: channels of the input.
      width: multiplier of all features but the classes.
      stem: ``"large"``: 7x7 of stride 2 and a max-pool; ``"small"``: 3x3; ``"auto"``:
        large from 96 pixels on, except for the thin CIFAR networks.
      shortcut: ``"projection"`` or ``"identity"``; ``"auto"`` as published.
      rngs: for the initial values.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        method: Method,
        num_classes: int,
        image_size: int,
        channels: int,
        width: float,
        stem: str = "auto",
        shortcut: str = "auto",
        rngs: nnx.Rngs,
    ):
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        stem = resolve_stem(variant.stem if stem == "auto" else stem, image_size)
        if shortcut == "auto":
            shortcut = variant.shortcut
        total_stride = 2 ** (len(variant.blocks) - 1) * (4 if stem == "large" else 1)
        check_image_size(image_size, total_stride, stem)
        features = max(1, round(variant.features[0] * width))
        kernel, strides = (7, 2) if stem == "large" else (3, 1)
        self.stem = ConvUnit(
            method,
            channels,
            features,
            (kernel, kernel),
            site=Site("stem", after_relu=False),
            strides=strides,
            padding=kernel // 2,
            pool=Window(window=3, stride=2, padding=1) if stem == "large" else None,
            rngs=rngs,
        )
        self.run = method.run
        self.blocks = nnx.List[Block]([])
        for stage, (count, stage_features) in enumerate(
            zip(variant.blocks, variant.features, strict=True)
        ):
            for index in range(count):
                block = Block(
                    method,
                    features,
                    max(1, round(stage_features * width)),
                    strides=2 if stage > 0 and index == 0 else 1,
                    bottleneck=variant.bottleneck,
                    projection=shortcut == "projection",
                    branch=Branch(
                        index=len(self.blocks) + 1,
                        count=sum(variant.blocks),
                        layers=3 if variant.bottleneck else 2,
                    ),
                    rngs=rngs,
                )
                self.blocks.append(block)
                features = block.out_features
        self.classifier = method.dense(features, num_classes, site=Site("classifier"), rngs=rngs)
        self.head = method.head(num_classes)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Maps normalized images ``(B, H, W, C)`` to logits ``(B, num_classes)``."""
        x = self.stem(images)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(self.classifier(global_average_pool(x)))
