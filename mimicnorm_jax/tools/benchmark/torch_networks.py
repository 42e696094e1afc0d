"""The paper's networks in plain ``torch.nn``: layers, shapes and numbers of parameters are ours.

Torch is no dependency of this project: only what is called imports it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from mimicnorm_jax.errors import UserError, first_line, unknown
from mimicnorm_jax.models import resnet, vgg
from mimicnorm_jax.models.stem import check_image_size, resolve_stem

PREFIX = "torch:"  # of a label: torch:batchnorm
METHODS = ("batchnorm", "nonorm")
RESNETS = {n: v for n, v in resnet.VARIANTS.items() if v.shortcut == "projection"}
NETWORKS = (*RESNETS, *vgg.STAGE_LAYERS)


def import_torch() -> Any:
    """The module ``torch``.

    Raises:
      UserError: it is missing.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"methods that begin with {PREFIX} need PyTorch, which cannot be imported "
            f"({first_line(error)}): pip install torch"
        ) from error


def check(network: str, method: str) -> None:
    """Finds out whether a network is offered here, and PyTorch is installed.

    Raises:
      UserError: it is not.
    """
    if network not in NETWORKS:
        raise unknown(f"network for methods that begin with {PREFIX}", network, NETWORKS)
    if method not in METHODS:
        raise unknown("--methods", PREFIX + method, [PREFIX + name for name in METHODS])
    import_torch()


def _unit(
    method: str,
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    strides: int = 1,
    activate: bool = True,
) -> list[Any]:
    """Convolution, norm, activation: the layers of a ``ConvUnit`` without its pool."""
    nn = import_torch().nn
    normalizes = method == "batchnorm"
    conv = nn.Conv2d(
        in_features,
        out_features,
        kernel_size,
        strides,
        padding=kernel_size // 2,
        bias=not normalizes,
    )
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    layers = [conv]
    if normalizes:
        layers.append(nn.BatchNorm2d(out_features))
    elif conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if activate:
        layers.append(nn.ReLU(inplace=True))
    return layers


@functools.cache
def _block_class() -> Any:
    torch = import_torch()
    module: Any = torch.nn.Module

    class Block(module):
        """A residual block, of which only the sum is no sequence of layers."""

        def __init__(self, branch: Any, shortcut: Any):
            super().__init__()
            self.branch = branch
            self.shortcut = shortcut
            self.activation = torch.nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            return self.activation(self.branch(x) + self.shortcut(x))

    return Block


def _resnet(
    name: str, method: str, *, num_classes: int, image_size: int, channels: int, width: float
) -> Any:
    nn, variant = import_torch().nn, RESNETS[name]
    large = resolve_stem(variant.stem, image_size) == "large"
    total_stride = 2 ** (len(variant.blocks) - 1) * (4 if large else 1)
    check_image_size(image_size, total_stride, "large" if large else "small")
    features = max(1, round(variant.features[0] * width))
    layers = _unit(method, channels, features, 7 if large else 3, strides=2 if large else 1)
    if large:
        layers.append(nn.MaxPool2d(3, 2, padding=1))
    for stage, (count, stage_features) in enumerate(
        zip(variant.blocks, variant.features, strict=True)
    ):
        inner = max(1, round(stage_features * width))
        out = inner * (4 if variant.bottleneck else 1)
        for index in range(count):
            strides = 2 if stage > 0 and index == 0 else 1
            if variant.bottleneck:
                branch = [
                    *_unit(method, features, inner, 1),
                    *_unit(method, inner, inner, 3, strides=strides),
                    *_unit(method, inner, out, 1, activate=False),
                ]
            else:
                branch = [
                    *_unit(method, features, inner, 3, strides=strides),
                    *_unit(method, inner, out, 3, activate=False),
                ]
            shortcut = (
                _unit(method, features, out, 1, strides=strides, activate=False)
                if strides != 1 or features != out
                else []
            )
            layers.append(_block_class()(nn.Sequential(*branch), nn.Sequential(*shortcut)))
            features = out
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes))
    return nn.Sequential(*layers, *head)


def _vgg(
    name: str, method: str, *, num_classes: int, image_size: int, channels: int, width: float
) -> Any:
    nn = import_torch().nn
    if image_size < vgg.TOTAL_STRIDE or image_size % vgg.TOTAL_STRIDE:
        raise UserError(
            f"vgg needs an image size that is a multiple of {vgg.TOTAL_STRIDE}, got {image_size}"
        )
    layers: list[Any] = []
    features = channels
    for stage_features, count in zip(vgg.STAGE_FEATURES, vgg.STAGE_LAYERS[name], strict=True):
        out = max(1, round(stage_features * width))
        for _ in range(count):
            layers += _unit(method, features, out, 3)
            features = out
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    features *= (image_size // vgg.TOTAL_STRIDE) ** 2
    hidden = max(1, round(vgg.HIDDEN_FEATURES * width))
    for _ in range(2):
        dense = nn.Linear(features, hidden)
        nn.init.kaiming_normal_(dense.weight, nonlinearity="relu")
        layers += [dense, nn.ReLU(inplace=True), nn.Dropout(0.5)]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def create_network(
    network: str,
    method: str,
    *,
    num_classes: int,
    image_size: int,
    channels: int = 3,
    width: float = 1.0,
) -> Any:
    """A ``torch.nn.Module`` that maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``.

    Args:
      network, num_classes, image_size, channels, width: as for ``mimicnorm_jax.models``.
      method: ``"batchnorm"`` (after each convolution, which then has no bias) or ``"nonorm"``.

    Raises:
      UserError: what is not offered, or PyTorch is missing.
    """
    check(network, method)
    create = _resnet if network in RESNETS else _vgg
    return create(
        network,
        method,
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        width=width,
    )
