"""ShuffleNetV2 (Ma et al. 2018), for ImageNet and, with a 3x3 stem of stride 1, CIFAR."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.methods import Method, Site
from mimicnorm_jax.models.channels import halves, interleave
from mimicnorm_jax.models.pooling import Window, global_average_pool
from mimicnorm_jax.models.stem import check_image_size, resolve_stem
from mimicnorm_jax.models.unit import ConvUnit

STEM_FEATURES = 24
STAGE_UNITS = (4, 8, 4)
# features of the three stages and of the last convolution
VARIANTS = {
    "shufflenetv2_x0_5": (48, 96, 192, 1024),
    "shufflenetv2_x1_0": (116, 232, 464, 1024),
    "shufflenetv2_x1_5": (176, 352, 704, 1024),
    "shufflenetv2_x2_0": (244, 488, 976, 2048),
}


class Unit(nnx.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions on half of the channels, then a shuffle.

    With stride 2 both halves of the output are computed from the whole input.

    Args:
      method: what normalizes the network.
      in_features: channels of the input.
      out_features: channels of the output; equal to ``in_features`` with stride 1.
      strides: 1 or 2.
      rngs: for the initial values.
    """

    def __init__(
        self, method: Method, in_features: int, out_features: int, *, strides: int, rngs: nnx.Rngs
    ):
        half = out_features // 2
        # A depthwise convolution has no activation, so what follows is not rectified.
        after_depthwise = Site("inner", after_relu=False)

        def depthwise(features: int) -> ConvUnit:
            return ConvUnit(
                method,
                features,
                features,
                (3, 3),
                site=Site("depthwise"),
                strides=strides,
                padding=1,
                feature_group_count=features,
                activate=False,
                rngs=rngs,
            )

        def pointwise(features: int, site: Site) -> ConvUnit:
            return ConvUnit(method, features, half, (1, 1), site=site, rngs=rngs)

        self.shortcut = (
            nnx.List([depthwise(in_features), pointwise(in_features, after_depthwise)])
            if strides == 2
            else None
        )
        branch_in = in_features if strides == 2 else half
        self.branch = nnx.List(
            [
                pointwise(branch_in, Site("inner")),
                depthwise(half),
                pointwise(half, after_depthwise),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, in_features)`` to ``(B, H / strides, W / strides, out_features)``."""
        if self.shortcut is None:
            shortcut, x = halves(x)
        else:
            shortcut = x
            for unit in self.shortcut:
                shortcut = unit(shortcut)
        for unit in self.branch:
            x = unit(x)
        return interleave(shortcut, x)


class ShuffleNetV2(nnx.Module):
    """Stem, three stages of units, a 1x1 convolution, global average, classifier.

    Args:
      features: of the three stages and of the last convolution.
      method: what normalizes the network.
      num_classes: features of the last layer.
      image_size: height and width of the input.
      channels: channels of the input.
      width: multiplier of all features but the classes.
      stem: ``"large"``: 3x3 of stride 2 and a max-pool; ``"small"``: 3x3 of stride 1;
        ``"auto"``: by image size.
      rngs: for the initial values.
    """

    def __init__(
        self,
        features: tuple[int, ...],
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
        check_image_size(image_size, 8 * (4 if stem == "large" else 1), stem)
        *stages, last = (2 * max(1, round(count * width / 2)) for count in features)
        current = max(1, round(STEM_FEATURES * width))
        self.stem = ConvUnit(
            method,
            channels,
            current,
            (3, 3),
            site=Site("stem", after_relu=False),
            strides=2 if stem == "large" else 1,
            padding=1,
            pool=Window(window=3, stride=2, padding=1) if stem == "large" else None,
            rngs=rngs,
        )
        self.run = method.run
        self.units = nnx.List[Unit]([])
        for count, out in zip(STAGE_UNITS, stages, strict=True):
            for index in range(count):
                strides = 2 if index == 0 else 1
                self.units.append(Unit(method, current, out, strides=strides, rngs=rngs))
                current = out
        self.last = ConvUnit(method, current, last, (1, 1), site=Site("inner"), rngs=rngs)
        self.classifier = method.dense(last, num_classes, site=Site("classifier"), rngs=rngs)
        self.head = method.head(num_classes)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Maps normalized images ``(B, H, W, C)`` to logits ``(B, num_classes)``."""
        x = self.stem(images)
        for unit in self.units:
            x = self.run(unit, x)
        return self.head(self.classifier(global_average_pool(self.last(x))))
