"""The networks by name. No file here names a method: see ``mimicnorm_jax.methods``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.methods import METHODS, Method, create_method
from mimicnorm_jax.models import mlp, resnet, shufflenet, squeezenet, vgg
from mimicnorm_jax.precision import resolve_precision

#: What makes a network, by its name.
NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp.MLP,
    **{name: functools.partial(vgg.VGG, layers) for name, layers in vgg.STAGE_LAYERS.items()},
    **{
        name: functools.partial(resnet.ResNet, variant) for name, variant in resnet.VARIANTS.items()
    },
    "squeezenet": squeezenet.SqueezeNet,
    **{
        name: functools.partial(shufflenet.ShuffleNetV2, features)
        for name, features in shufflenet.VARIANTS.items()
    },
}
BRANCHED = frozenset(resnet.VARIANTS)
_COMMON = frozenset({"method", "num_classes", "image_size", "channels", "width", "rngs"})


def network_options(name: str) -> list[str]:
    """Names of the options that a network has beyond the common arguments.

    Args:
      name: one of ``NETWORKS``.

    Raises:
      UserError: an unknown name.
    """
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    network = NETWORKS[name]
    module = network.func if isinstance(network, functools.partial) else network
    # of __init__: the signature of a Flax module itself is that of its metaclass
    signature = inspect.signature(module.__init__)
    return [
        option
        for option, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and option not in _COMMON
    ]


def create_model(
    name: str,
    *,
    method: str | Method,
    num_classes: int,
    image_size: int,
    channels: int = 3,
    width: float = 1.0,
    precision: str = "auto",
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """Creates a network whose layers are those of a method.

    Example::

      model = create_model(
          "resnet18", method=method, num_classes=100, image_size=32, rngs=nnx.Rngs(0)
      )
      logits = model(images)  # (B, 32, 32, 3) -> (B, 100)
      model.eval()  # from now on with running statistics and without dropout

    Args:
      name: one of ``NETWORKS``.
      method: a name of ``METHODS``, or a ``Method`` with options of its own.
      num_classes: number of logits.
      image_size: height and width of the images, in pixels.
      channels: channels of the images.
      width: multiplier of the network's features.
      precision: see ``resolve_precision``.
      rngs: for the initial values; the ``params`` stream is used.
      **options: options of the network, see ``network_options``.

    Returns:
      A module, in training mode, that maps normalized images ``(B, H, W, C)`` to logits
      ``(B, num_classes)`` in at least float32; in training VGG also takes
      ``keys=(B,)`` for its dropout.

    Raises:
      UserError: an unknown name or option, a method that does not fit the network, or
        images too small for it.
    """
    allowed = network_options(name)
    for option in options:
        if option not in allowed:
            raise unknown(f"option of network {name!r}", option, allowed)
    for what, value in (("num_classes", num_classes), ("channels", channels), ("width", width)):
        if value <= 0:
            raise UserError(f"{what} must be positive, got {value}")
    if isinstance(method, str):
        method = create_method(method)
    if method.needs_branches and name not in BRANCHED:
        fitting = ", ".join(m for m, kind in METHODS.items() if not kind.needs_branches)
        raise UserError(
            f"method {method.name!r} needs residual branches, which network {name!r} does not "
            f"have; methods that fit: {fitting}"
        )
    method = dataclasses.replace(method, precision=resolve_precision(precision))
    return NETWORKS[name](
        method=method,
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        width=width,
        rngs=rngs,
        **options,
    )
