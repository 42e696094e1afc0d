"""What torchvision and timm call the layers of our networks."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models.resnet import ResNet
from mimicnorm_jax.models.shufflenet import STAGE_UNITS, ShuffleNetV2
from mimicnorm_jax.models.vgg import VGG
from mimicnorm_jax.weights.layers import CLASSIFIER

_RESNET_STAGES = 4
_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


class TorchNames(NamedTuple):
    """Names of a convolution or linear layer, and of the BatchNorm behind it, if any."""

    layer: str
    norm: str | None


def torch_names(model: nnx.Module, *, norms: bool = True) -> dict[str, TorchNames]:
    """The names of a network's layers in torchvision.

    timm's ``resnet18``, ``34``, ``50``, ``101`` and ``152`` have the same.

    Args:
      model: a ResNet, VGG or ShuffleNetV2 of ``create_model``, of any method.
      norms: of VGG, whether that with BatchNorms is meant, such as ``vgg16_bn``, or without: they
        are counted. The other networks are always with them there.

    Returns:
      The names by the paths of ``layers_of``, from the input on.

    Raises:
      UserError: nothing in torchvision is like the network.
    """
    if isinstance(model, ResNet):
        return dict(_resnet(model))
    if isinstance(model, VGG):
        return dict(_vgg(model, norms))
    if isinstance(model, ShuffleNetV2):
        return dict(_shufflenet(model))
    raise UserError(
        f"nothing in torchvision is like this {type(model).__name__}; networks that are: resnet18, "
        "resnet34, resnet50, resnet101, resnet152, vgg and shufflenetv2"
    )


def check_variant(model: nnx.Module, names: Collection[str]) -> None:
    """Refuses files of ResNets that share most names with torchvision's, but are others.

    Args:
      model: the network to load into.
      names: those in the file.

    Raises:
      UserError: timm's ResNet-C and -D, or another with such a stem or such shortcuts.
    """
    if not isinstance(model, ResNet):
        return
    differs = []
    if "conv1.0.weight" in names:
        differs.append("a deep stem (conv1.0)")
    if any(name.endswith(".downsample.2.weight") for name in names):
        differs.append("shortcuts with an average pool (downsample.2)")
    if differs:
        raise UserError(
            f"the file is of another ResNet, with {' and '.join(differs)}, such as timm's "
            "resnet50d or resnet50c; those that fit are torchvision's and timm's resnet18, "
            "resnet34, resnet50, resnet101 and resnet152"
        )


def likely_network(names: Collection[str]) -> str | None:
    """Of which network of this package a file of torchvision is, by the names in it."""
    first = [re.fullmatch(r"layer(\d)\.\d+\.conv1\.weight", name) for name in names]
    blocks = collections.Counter(found[1] for found in first if found)
    if blocks:
        kind = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
        return _RESNETS.get((kind, tuple(blocks[key] for key in sorted(blocks))))
    if "stage2.0.branch2.0.weight" in names:
        return "a ShuffleNetV2"
    dense = sum(name.endswith(".weight") for name in names if name.startswith("classifier."))
    if dense != 3:
        return None
    layers = {name for name in names if re.fullmatch(r"features\.\d+\.weight", name)}
    norms = {name for name in names if re.fullmatch(r"features\.\d+\.running_var", name)}
    return {8: "vgg11", 10: "vgg13", 13: "vgg16", 16: "vgg19"}.get(len(layers) - len(norms))


def _check_stem(model: ResNet | ShuffleNetV2) -> None:
    if model.stem.pool is None:
        raise UserError(
            f"this {type(model).__name__} has the stem for small images, and nothing in "
            'torchvision is like it; create_model(..., stem="large") and '
            "--config.network_options.stem=large have the other"
        )


def _resnet(model: ResNet) -> Iterator[tuple[str, TorchNames]]:
    blocks = list(model.blocks)
    stages = 1 + sum(block.strides != 1 for block in blocks)
    if stages != _RESNET_STAGES or any(b.changes_shape and b.projection is None for b in blocks):
        raise UserError(
            "nothing in torchvision is like this ResNet: those there have four stages and "
            "convolutions where the shape changes"
        )
    _check_stem(model)
    yield "stem/conv", TorchNames("conv1", "bn1")
    stage, number = 1, -1
    for index, block in enumerate(blocks):
        stage, number = (stage + 1, 0) if block.strides != 1 else (stage, number + 1)
        ours, theirs = f"blocks/{index}", f"layer{stage}.{number}"
        for layer in range(len(block.branch)):
            names = TorchNames(f"{theirs}.conv{layer + 1}", f"{theirs}.bn{layer + 1}")
            yield f"{ours}/branch/{layer}/conv", names
        if block.projection is not None:
            names = TorchNames(f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            yield f"{ours}/projection/conv", names
    yield CLASSIFIER, TorchNames("fc", None)


def _vgg(model: VGG, norms: bool) -> Iterator[tuple[str, TorchNames]]:
    place = 0
    for index, stage in enumerate(model.stages):
        for layer in range(len(stage)):
            norm = f"features.{place + 1}" if norms else None
            yield f"stages/{index}/{layer}/conv", TorchNames(f"features.{place}", norm)
            place += 3 if norms else 2  # the ReLU counts
        place += 1  # the pool
    yield "hidden/0", TorchNames("classifier.0", None)
    yield "hidden/1", TorchNames("classifier.3", None)
    yield CLASSIFIER, TorchNames("classifier.6", None)


def _shufflenet(model: ShuffleNetV2) -> Iterator[tuple[str, TorchNames]]:
    _check_stem(model)
    yield "stem/conv", TorchNames("conv1.0", "conv1.1")
    places = [(2 + s, i) for s, count in enumerate(STAGE_UNITS) for i in range(count)]
    for index, (unit, (stage, number)) in enumerate(zip(model.units, places, strict=True)):
        ours, theirs = f"units/{index}", f"stage{stage}.{number}"
        if unit.shortcut is not None:  # depthwise, norm, pointwise, norm, ReLU
            for layer, at in enumerate((0, 2)):
                names = TorchNames(f"{theirs}.branch1.{at}", f"{theirs}.branch1.{at + 1}")
                yield f"{ours}/shortcut/{layer}/conv", names
        for layer, at in enumerate((0, 3, 5)):  # here a ReLU follows the first norm
            names = TorchNames(f"{theirs}.branch2.{at}", f"{theirs}.branch2.{at + 1}")
            yield f"{ours}/branch/{layer}/conv", names
    yield "last/conv", TorchNames("conv5.0", "conv5.1")
    yield CLASSIFIER, TorchNames("fc", None)
