"""The layers of a network of any method as plain arrays, and back into one of another method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimicnorm_jax.convert.fold import scale_and_shift
from mimicnorm_jax.convert.layers import passed_on
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import (
    LastBN,
    ScaledConv,
    ScaledDense,
    WeightMeanConv,
    WeightMeanDense,
)
from mimicnorm_jax.layers.scaled import ScaledKernel
from mimicnorm_jax.methods.base import Upcast, add, identity
from mimicnorm_jax.models.mlp import MLP
from mimicnorm_jax.models.resnet import ResNet
from mimicnorm_jax.models.shufflenet import ShuffleNetV2
from mimicnorm_jax.models.squeezenet import SqueezeNet
from mimicnorm_jax.models.unit import ConvUnit
from mimicnorm_jax.models.vgg import VGG
from mimicnorm_jax.weights.files import listed

CLASSIFIER = "classifier"
_NETWORKS = (ResNet, VGG, ShuffleNetV2, SqueezeNet, MLP)
# Exactly these: a subclass may do more with its kernel.
_LAYERS = (ScaledConv, ScaledDense, WeightMeanConv, WeightMeanDense, nnx.Linear, nnx.Conv)
_CENTERED = 1e-5  # mean of a channel's weights over their root mean square: float32 leaves 1e-7


class Norm(NamedTuple):
    """``scale * (x - mean) / sqrt(var + epsilon) + bias``, arrays of ``(C,)``."""

    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    epsilon: float


class Layer(NamedTuple):
    """A convolution or dense layer, and the norm behind it.

    Attributes:
      kernel: ``(H, W, I, O)`` or ``(I, O)``, as it meets the input.
      bias: ``(O,)``, or None.
      norm: what follows, or None.
    """

    kernel: np.ndarray
    bias: np.ndarray | None
    norm: Norm | None


class Place(NamedTuple):
    """Where a network has a layer: the module, its BatchNorm, or the last BN behind it."""

    layer: Any
    norm: Any
    last_bn: LastBN | None


class _Write(NamedTuple):
    variable: Any
    value: Any  # an array, or a number for all of the variable


class _Problem(Exception):  # noqa: N818
    """Why a layer does not fit, without its path: many have the same."""


def layers_of(model: nnx.Module) -> dict[str, Layer]:
    """Reads a network's layers.

    Args:
      model: a network of ``create_model``.

    Returns:
      The layers by their paths, such as ``blocks/0/branch/1/conv`` or ``classifier``. The last
      BN is the classifier's norm, of scale 1 and bias 0.

    Raises:
      UserError: another network, or a method whose layers are more than a kernel, a bias and a
        BatchNorm, such as Fixup.
    """
    return {path: _read(place) for path, place in places_of(model).items()}


def put_layers(
    model: nnx.Module, layers: Mapping[str, Layer], *, keep: Collection[str] = ()
) -> None:
    """Writes layers into a network, in place, so that in evaluation it is the same function.

    Where the network has a BatchNorm it takes over the layer's. Where it has none, the layer's is
    folded into kernel and bias, in float64, and a residual scalar becomes 1. Before anything is
    written, all is checked.

    Args:
      model: a network of ``create_model``; its method may differ from that of ``layers``.
      layers: what ``layers_of`` returns, of a network of the same shapes.
      keep: paths of layers that stay as they are, which ``layers`` does not have.

    Raises:
      UserError: a layer that is missing, too many or of another shape; no BatchNorm for one of
        the network's, or one of another epsilon; no bias to fold into; a kernel that weight mean
        would change; a network as ``layers_of`` refuses. The network is left as it was.
    """
    places = {path: place for path, place in places_of(model).items() if path not in keep}
    _check_names(places, layers)
    writes: list[_Write] = []
    problems: dict[str, list[str]] = {}
    for path, place in places.items():
        try:
            writes += _writes(place, layers[path])
        except _Problem as problem:
            problems.setdefault(str(problem), []).append(path)
    if problems:
        said = (f"{problem} ({listed(paths)})" for problem, paths in problems.items())
        raise UserError(f"the weights do not fit the network: {listed(said, separator='; ')}")
    for variable, value in writes:
        array = jnp.asarray(value, variable[...].dtype)
        variable[...] = jnp.broadcast_to(array, variable[...].shape)


def places_of(model: nnx.Module) -> dict[str, Place]:
    """Where a network has its layers, by their paths; see ``layers_of``."""
    if not isinstance(model, _NETWORKS):
        raise UserError(
            f"weights are read and written of networks of create_model, got {type(model).__name__}"
        )
    found: dict[str, Place] = {}
    for path, module in nnx.iter_modules(model):
        where = "/".join(map(str, path))
        if isinstance(module, ConvUnit):
            found[f"{where}/conv"] = _place(f"{where}/conv", module.conv, module.norm)
        merge = getattr(module, "merge", None)
        if merge not in (None, add):
            raise _unreadable(merge, f"{where}/merge")
    if isinstance(model, MLP):
        for index, (layer, norm) in enumerate(zip(model.layers, model.norms, strict=True)):
            found[f"layers/{index}"] = _place(f"layers/{index}", layer, norm)
    if isinstance(model, VGG):
        for index, layer in enumerate(model.hidden):
            found[f"hidden/{index}"] = _place(f"hidden/{index}", layer, identity)
    head: Any = model.head
    if not isinstance(head, LastBN | Upcast | nnx.Sequential):  # the last: of a folded network
        raise _unreadable(head, "head")
    classifier = _place(CLASSIFIER, model.classifier, identity)
    last_bn = head if isinstance(head, LastBN) else None
    return found | {CLASSIFIER: classifier._replace(last_bn=last_bn)}


def _place(path: str, layer: Any, norm: Any) -> Place:
    if type(layer) not in _LAYERS:
        raise _unreadable(layer, path)
    if norm is identity or _passes_on(norm):
        return Place(layer, None, None)
    if not all(hasattr(norm, name) for name in ("mean", "var", "scale", "bias", "epsilon")):
        raise _unreadable(norm, f"the norm of {path}")
    return Place(layer, norm, None)


def _passes_on(norm: Any) -> bool:
    """Whether a norm is what ``fold`` leaves of one that it took into the layer before."""
    return isinstance(norm, nnx.Sequential) and all(f is passed_on for f in norm.layers)


def _unreadable(module: Any, where: str) -> UserError:
    kind = getattr(module, "__name__", type(module).__name__)
    return UserError(
        f"{where} is a {kind}, which is more than a kernel, a bias and a BatchNorm: weights go "
        "between batchnorm, lastbn, mimicnorm, nonorm, skipinit and weightmean"
    )


def _wide(variable: Any) -> np.ndarray:
    """A variable or array as NumPy's, in at least float32."""
    array = np.asarray(variable[...])
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _read(place: Place) -> Layer:
    layer, norm, last_bn = place
    scaled = isinstance(layer, ScaledKernel)
    kernel = layer.effective_kernel() if scaled else layer.kernel
    bias = layer.effective_bias() if scaled else layer.bias
    read = None
    if norm is not None:
        read = Norm(
            scale=_wide(norm.scale),
            bias=_wide(norm.bias),
            mean=_wide(norm.mean),
            var=_wide(norm.var),
            epsilon=float(norm.epsilon),
        )
    elif last_bn is not None:
        mean, var = _wide(last_bn.mean), _wide(last_bn.var)
        read = Norm(np.ones_like(mean), np.zeros_like(mean), mean, var, float(last_bn.epsilon))
    return Layer(_wide(kernel), None if bias is None else _wide(bias), read)


def _check_names(places: Mapping[str, Place], layers: Mapping[str, Layer]) -> None:
    missing = [path for path in places if path not in layers]
    unused = [path for path in layers if path not in places]
    said = [f"missing {listed(missing)}"] if missing else []
    said += [f"the network has no {listed(unused)}"] if unused else []
    if said:
        raise UserError(f"the weights do not fit the network: {'; '.join(said)}")


def _writes(place: Place, layer: Layer) -> list[_Write]:
    """What makes a place compute what a layer does.

    Raises:
      _Problem: it cannot.
    """
    target, norm, last_bn = place
    if target.kernel[...].shape != layer.kernel.shape:
        raise _Problem(
            f"the kernel has the shape {layer.kernel.shape}, and the network's "
            f"{target.kernel[...].shape}"
        )
    if norm is not None:
        layer, statistics = _with_norm(norm, layer, has_bias=target.bias is not None)
    elif last_bn is not None:
        layer, statistics = _with_last_bn(last_bn, layer, has_bias=target.bias is not None)
    else:
        layer, statistics = folded(layer), []
    writes = [_Write(target.kernel, layer.kernel), *statistics]
    if target.bias is not None:
        writes.append(_Write(target.bias, 0.0 if layer.bias is None else layer.bias))
    elif layer.bias is not None and np.any(layer.bias):
        raise _Problem("the network's layer has no bias to fold into")
    if getattr(target, "weight_mean", None) is not None and not _is_centered(layer.kernel):
        raise _Problem(
            "weight mean would change the pretrained kernels; methods that fit: lastbn, nonorm, "
            "batchnorm"
        )
    if getattr(target, "scale", None) is not None:
        writes.append(_Write(target.scale, 1.0))
    return writes


def folded(layer: Layer) -> Layer:
    """The same function without a norm, in float64."""
    if layer.norm is None:
        return layer
    scale, shift = scale_and_shift(layer.norm)
    old = 0.0 if layer.bias is None else np.asarray(layer.bias, np.float64)
    return Layer(layer.kernel.astype(np.float64) * scale, old * scale + shift, None)


def _without_bias(layer: Layer, has_bias: bool) -> tuple[Layer, np.ndarray]:
    """A layer whose bias, where there is no place for it, is in the mean of its norm."""
    assert layer.norm is not None
    mean = layer.norm.mean
    if layer.bias is None or has_bias:
        return layer, mean
    mean = np.asarray(mean, np.float64) - layer.bias
    return layer._replace(bias=None), mean


def _with_norm(norm: Any, layer: Layer, *, has_bias: bool) -> tuple[Layer, list[_Write]]:
    """The layer, and what its norm becomes in a BatchNorm."""
    if layer.norm is None:
        raise _Problem("there is no BatchNorm to fill the network's")
    if layer.norm.epsilon != norm.epsilon:
        raise _Problem(
            f"the BatchNorm has epsilon {layer.norm.epsilon}, and the network's {norm.epsilon}"
        )
    layer, mean = _without_bias(layer, has_bias)
    assert layer.norm is not None
    return layer, [
        _Write(norm.scale, layer.norm.scale),
        _Write(norm.bias, layer.norm.bias),
        _Write(norm.mean, mean),
        _Write(norm.var, layer.norm.var),
    ]


def _with_last_bn(last_bn: LastBN, layer: Layer, *, has_bias: bool) -> tuple[Layer, list[_Write]]:
    """The layer, and the statistics with which the last BN gives its outputs.

    A last BN's are taken over. Of anything else, its bias becomes the mean, and the variance is
    such that it divides by 1.
    """
    norm = layer.norm
    if norm is not None and _is_last_bn(norm, last_bn.epsilon):
        layer, mean = _without_bias(layer, has_bias)
        return layer, [_Write(last_bn.mean, mean), _Write(last_bn.var, norm.var)]
    plain = folded(layer)
    statistics = [_Write(last_bn.mean, 0.0), _Write(last_bn.var, 1 - last_bn.epsilon)]
    if plain.bias is not None and not has_bias:
        statistics[0] = _Write(last_bn.mean, -plain.bias)
        plain = plain._replace(bias=None)
    return plain, statistics


def _is_last_bn(norm: Norm, epsilon: float) -> bool:
    return bool(norm.epsilon == epsilon and np.all(norm.scale == 1) and not np.any(norm.bias))


def _is_centered(kernel: np.ndarray) -> bool:
    wide = kernel.astype(np.float64)
    axes = tuple(range(kernel.ndim - 1))
    size = np.sqrt(np.square(wide).mean(axes))
    return bool(np.all(np.abs(wide.mean(axes)) <= _CENTERED * size))
