"""Pretrained weights of torchvision and timm in our networks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models.vgg import TOTAL_STRIDE, VGG
from mimicnorm_jax.weights.files import COUNTER, check_shapes, listed, read_tensors
from mimicnorm_jax.weights.layers import CLASSIFIER, Layer, Norm, places_of, put_layers
from mimicnorm_jax.weights.torch_names import TorchNames, check_variant, likely_network, torch_names

EPSILON = 1e-5  # of every BatchNorm in torchvision's and timm's networks of these names
_POOLED = 7  # height and width to which torchvision's VGG pools before its dense layers
_NORM = ("weight", "bias", "running_mean", "running_var")
_IGNORED = ".num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What ``load_torch_weights`` did.

    Attributes:
      loaded: paths of the layers that have the file's weights now, from the input on.
      new_classifier: whether the classifier stayed as it was, having other classes.
      left_out: names in the file that were not used.
    """

    loaded: tuple[str, ...]
    new_classifier: bool
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        said = [f"loaded {len(self.loaded)} layers"]
        if self.new_classifier:
            said.append("the classifier is as it was: the file's has other classes")
        if self.left_out:
            said.append(f"left out {listed(self.left_out)}")
        return "; ".join(said)


class _Expected(NamedTuple):
    """An entry that the file is to have: for which of our layers, and of which shape there."""

    path: str
    shape: tuple[int, ...]


def load_torch_weights(model: nnx.Module, file: str | os.PathLike[str]) -> LoadReport:
    """Loads weights of torchvision, or timm's of the same names, into a network.

    Example::

      model = create_model(
          "resnet50", method="lastbn", num_classes=1000, image_size=224, rngs=nnx.Rngs(0)
      )
      print(load_torch_weights(model, "resnet50.pth"))

    In evaluation the network gives the file's logits, with any of these methods: ``batchnorm``
    takes over the BatchNorms; ``lastbn``, ``nonorm`` and ``skipinit`` have them folded into the
    convolutions. Weight mean would change the kernels, so ``mimicnorm`` is refused. Where the
    number of classes differs, the classifier stays as it is.

    A file holds names and shapes, not what is computed between them: one of a network with the
    same names that does something else, such as timm's ``resnetblur50``, cannot be told apart.

    Args:
      model: a ResNet (18 to 152), VGG or ShuffleNetV2 of ``create_model``, changed in place. A
        ResNet and a ShuffleNetV2 need ``stem="large"``, the usual one from 96 pixels on; a VGG
        ``image_size=224``.
      file: a state dict, see ``read_tensors``. VGG's may be with BatchNorms or without.

    Returns:
      What was loaded, and what was not.

    Raises:
      UserError: the file cannot be read; entries are missing, too many or of another shape; the
        network has nothing like it in torchvision, or its method does not fit. The network is
        left as it was.
    """
    names = torch_names(model)  # what has none needs no file
    _check_vgg(model)
    places = places_of(model)
    tensors = {n: v for n, v in read_tensors(file).items() if not n.endswith(_IGNORED)}
    check_variant(model, tensors)
    if isinstance(model, VGG) and not any(name.endswith(".running_var") for name in tensors):
        names = torch_names(model, norms=False)
    expected: dict[str, _Expected] = {}
    for path, theirs in names.items():
        # Their convolutions have biases in VGG only, dense layers always.
        has_bias = theirs.norm is None or isinstance(model, VGG)
        shape = places[path].layer.kernel[...].shape
        expected |= _entries(path, theirs, shape, has_bias=has_bias)
    left_out = [name for name in tensors if name == COUNTER]
    new_classifier = _has_other_classes(tensors, expected, names[CLASSIFIER].layer)
    if new_classifier:
        del names[CLASSIFIER]
        of_classifier = [name for name, entry in expected.items() if entry.path == CLASSIFIER]
        left_out += [name for name in of_classifier if name in tensors]
        expected = {name: e for name, e in expected.items() if e.path != CLASSIFIER}
    used = {name: value for name, value in tensors.items() if name not in left_out}
    try:
        check_shapes(used, {name: e.shape for name, e in expected.items()}, os.fspath(file))
    except UserError as error:
        likely = likely_network(tensors)
        said = f"that is {likely}" if likely else "that is no ResNet, VGG or ShuffleNetV2"
        raise UserError(f"{error}; by the names in it, {said}") from error
    layers = {path: _layer(model, path, theirs, tensors) for path, theirs in names.items()}
    put_layers(model, layers, keep=(CLASSIFIER,) if new_classifier else ())
    return LoadReport(tuple(names), new_classifier, tuple(left_out))


def _spatial_size(model: VGG) -> int:
    """Height and width of what a VGG's first dense layer is given."""
    places = places_of(model)
    *_, last = (path for path in torch_names(model) if path.startswith("stages/"))
    channels = places[last].layer.kernel[...].shape[-1]
    return math.isqrt(places["hidden/0"].layer.kernel[...].shape[0] // channels)


def _check_vgg(model: nnx.Module) -> None:
    if isinstance(model, VGG) and _spatial_size(model) != _POOLED:
        size = _spatial_size(model)
        fits = _POOLED * TOTAL_STRIDE
        raise UserError(
            f"torchvision's VGGs pool to {_POOLED}x{_POOLED} before their dense layers, as images "
            f"of {fits} pixels give it, and this one has {size}x{size} there: create it with "
            f"image_size={fits}, got {size * TOTAL_STRIDE}"
        )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """That of a kernel in PyTorch: output first, then input, then height and width."""
    return (shape[-1], shape[-2], *shape[:-2])


def _entries(
    path: str, theirs: TorchNames, shape: tuple[int, ...], *, has_bias: bool
) -> dict[str, _Expected]:
    """What the file is to have for a layer whose kernel has the given shape here."""
    found = {f"{theirs.layer}.weight": _Expected(path, _torch_shape(shape))}
    channels = _Expected(path, shape[-1:])
    if has_bias:
        found[f"{theirs.layer}.bias"] = channels
    if theirs.norm is not None:
        found |= {f"{theirs.norm}.{entry}": channels for entry in _NORM}
    return found


def _has_other_classes(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, _Expected], classifier: str
) -> bool:
    """Whether the file's classifier differs from ours in the number of classes, and only so."""
    weight, bias = tensors.get(f"{classifier}.weight"), tensors.get(f"{classifier}.bias")
    if weight is None or bias is None or weight.ndim != 2:
        return False
    classes, features = expected[f"{classifier}.weight"].shape
    return weight.shape[1] == features and weight.shape[0] != classes and bias.ndim == 1


def _layer(
    model: nnx.Module, path: str, theirs: TorchNames, tensors: Mapping[str, np.ndarray]
) -> Layer:
    """A layer of the file in our layout."""
    kernel = tensors[f"{theirs.layer}.weight"]
    if isinstance(model, VGG) and path == "hidden/0":
        kernel = channels_last(kernel, _POOLED)
    kernel = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    norm = None
    if theirs.norm is not None:
        scale, bias, mean, var = (tensors[f"{theirs.norm}.{entry}"] for entry in _NORM)
        norm = Norm(scale, bias, mean, var, EPSILON)
    return Layer(kernel, tensors.get(f"{theirs.layer}.bias"), norm)


def channels_last(weight: np.ndarray, size: int) -> np.ndarray:
    """A dense layer's weight for an image that is flattened with its channels last.

    Args:
      weight: ``(O, C size size)``, for one flattened with its channels first.
      size: height and width of the image.

    Returns:
      ``(O, size size C)``.
    """
    outputs = weight.shape[0]
    return weight.reshape(outputs, -1, size, size).transpose(0, 2, 3, 1).reshape(outputs, -1)
