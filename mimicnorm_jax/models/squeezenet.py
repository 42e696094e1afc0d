"""SqueezeNet with simple bypass (Iandola et al. 2016), for ImageNet and CIFAR."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.methods import Branch, Method, Site
from mimicnorm_jax.models.channels import concatenate
from mimicnorm_jax.models.pooling import Window, global_average_pool, max_pool
from mimicnorm_jax.models.stem import check_image_size, resolve_stem
from mimicnorm_jax.models.unit import ConvUnit

STEM_FEATURES = 96
# (squeeze features, expand features of each of the two kernels) of fire modules 2 to 9
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
BYPASSED = (3, 5, 7)  # modules whose input is added to their output
POOLED = (4, 8)  # modules a max-pool follows


class Fire(nnx.Module):
    """1x1 convolution to few features, then 1x1 and 3x3 convolutions side by side.

    Args:
      method: what normalizes the network.
      in_features: channels of the input.
      squeeze: features between.
      expand: features of each of the two parallel convolutions.
      bypass: the residual branch the module is, where its input is added to its output.
      rngs: for the initial values.
    """

    def __init__(
        self,
        method: Method,
        in_features: int,
        squeeze: int,
        expand: int,
        *,
        bypass: Branch | None,
        rngs: nnx.Rngs,
    ):
        site = Site("inner")
        self.squeeze = ConvUnit(method, in_features, squeeze, (1, 1), site=site, rngs=rngs)
        self.expand1x1 = ConvUnit(method, squeeze, expand, (1, 1), site=site, rngs=rngs)
        self.expand3x3 = ConvUnit(method, squeeze, expand, (3, 3), site=site, padding=1, rngs=rngs)
        self.merge = None if bypass is None else method.merge(branch=bypass)
        self.out_features = 2 * expand

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, in_features)`` to ``(B, H, W, 2 expand)``."""
        squeezed = self.squeeze(x)
        y = concatenate(self.expand1x1(squeezed), self.expand3x3(squeezed))
        return y if self.merge is None else self.merge(x, y)


class SqueezeNet(nnx.Module):
    """Stem and pool, eight fire modules with bypasses and pools, average, classifier.

    The published classifier is a 1x1 convolution before the average over the image; as
    both are linear, the average comes first here: the same function, in a fraction of the
    work and memory.

    Args:
      method: what normalizes the network.
      num_classes: features of the last layer.
      image_size: height and width of the input.
      channels: channels of the input.
      width: multiplier of all features but the classes.
      stem: ``"large"``: 7x7 of stride 2; ``"small"``: 3x3; ``"auto"``: by image size. A
        max-pool follows both.
      rngs: for the initial values.
    """

    def __init__(
        self,
        *,
        method: Method,
        num_classes: int,
        image_size: int,
        channels: int,
        width: float,
        stem: str = "auto",
        rngs: nnx.Rngs,
    ):
        stem = resolve_stem(stem, image_size)
        check_image_size(image_size, 8 * (2 if stem == "large" else 1), stem)
        features = max(1, round(STEM_FEATURES * width))
        kernel, strides = (7, 2) if stem == "large" else (3, 1)
        self.stem = ConvUnit(
            method,
            channels,
            features,
            (kernel, kernel),
            site=Site("stem", after_relu=False),
            strides=strides,
            padding=kernel // 2,
            pool=Window(window=2, stride=2),
            rngs=rngs,
        )
        self.run = method.run
        self.pool = Window(window=2, stride=2)
        self.fires = nnx.List[Fire]([])
        for number, (squeeze, expand) in enumerate(FIRES, start=2):
            bypass = None
            if number in BYPASSED:
                index = BYPASSED.index(number) + 1
                bypass = Branch(index=index, count=len(BYPASSED), layers=2)
            fire = Fire(
                method,
                features,
                max(1, round(squeeze * width)),
                max(1, round(expand * width)),
                bypass=bypass,
                rngs=rngs,
            )
            self.fires.append(fire)
            features = fire.out_features
        site = Site("classifier", convolution=True)
        self.classifier = method.dense(features, num_classes, site=site, rngs=rngs)
        self.head = method.head(num_classes)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Maps normalized images ``(B, H, W, C)`` to logits ``(B, num_classes)``."""
        x = self.stem(images)
        for number, fire in enumerate(self.fires, start=2):
            x = self.run(fire, x)
            if number in POOLED:
                x = max_pool(x, **self.pool._asdict())
        return self.head(self.classifier(global_average_pool(x)))
