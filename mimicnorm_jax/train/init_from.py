"""``config.init_from``: another run, or a file of weights, as what a run starts from."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.export.rebuilt import is_export, restore_export
from mimicnorm_jax.layers import ScaledConv
from mimicnorm_jax.methods import Method
from mimicnorm_jax.paths import expanded
from mimicnorm_jax.train.checkpoint import latest_step
from mimicnorm_jax.train.pretrained import (
    Pretrained,
    refused,
    remembered,
    values_of,
)
from mimicnorm_jax.train.restored import RestoredNetwork, restore
from mimicnorm_jax.train.state import digest
from mimicnorm_jax.weights import load_torch_weights
from mimicnorm_jax.weights.files import SUFFIXES, listed
from mimicnorm_jax.weights.layers import CLASSIFIER, Layer, Norm, layers_of, put_layers

# By which torchvision and timm normalize images for the weights they publish.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# What a method may do otherwise without another meaning of its parameters.
_SAME_WHATEVER: Mapping[str, Any] = {
    **{"axis_name": None, "scalar_rate": 1.0, "activation_storage": "full", "remat": "none"},
}
_OF_CLASSES = ("classifier", "head")


def find_pretrained(config: ConfigDict, workdir: pathlib.Path) -> Pretrained | None:
    """As ``read_pretrained``; of a run that has a checkpoint, what it remembers of its weights."""
    known = None
    if config.init_from and latest_step(workdir / "checkpoints"):
        known = remembered(workdir)
    return known or read_pretrained(config)


def read_pretrained(config: ConfigDict) -> Pretrained | None:
    """Reads the weights of ``config.init_from``.

    Args:
      config: of the run that is to start from them.

    Returns:
      None where the run starts from random weights.

    Raises:
      UserError: they cannot be read, or belong to another network.
    """
    if not config.init_from:
        if config.method_options.frozen:
            raise UserError(
                "config.method_options.frozen = True: BatchNorms that are never trained need "
                "weights to start from: --config.init_from=RUN or FILE"
            )
        return None
    path = expanded(config.init_from)
    try:
        if path.is_dir():
            return _of_run(config, path)
        if path.suffix not in SUFFIXES and path.exists():
            allowed = ", ".join(SUFFIXES)
            raise UserError(f"it is no folder of a run, and no file of weights ({allowed})")
        return _of_file(config, path)
    except UserError as error:
        raise refused(config.init_from, error) from error


def _of_file(config: ConfigDict, path: pathlib.Path) -> Pretrained:
    with refused_by_system(f"{path} cannot be read"), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def put(model: nnx.Module, class_names: Sequence[str]) -> str:
        report = load_torch_weights(model, path)
        classes = _new_classifier(class_names) if report.new_classifier else "its classifier too"
        return f"{len(report.loaded)} layers{_folded(config)}; {classes}"

    return Pretrained(config.init_from, sha256, *_IMAGENET, put=put)


def _of_run(config: ConfigDict, path: pathlib.Path) -> Pretrained:
    is_folded = is_export(path)
    source = restore_export(path) if is_folded else restore(path, "best")
    for name in ("network", "width"):
        there, here = source.config[name], config[name]
        if there != here:
            raise UserError(f"it has config.{name} = {there!r}, and this run {here!r}")

    def put(model: nnx.Module, class_names: Sequence[str]) -> str:
        columns = _columns(source, class_names)
        check_strides(model, source.model)
        if is_folded or _meaning(source.config) != _meaning(config):
            how = _put_layers(model, config, source, columns)
        else:
            how = ""
            _copy(model, source.model, columns, len(source.description.class_names))
        said = f"{source.config.network}, {source.config.method}, step {source.step}{how}"
        return f"{said}; {_of_classifier(source, class_names, columns)}"

    images = source.description.images
    sha256 = digest(values_of(source.model))
    return Pretrained(config.init_from, sha256, images.mean, images.std, put=put)


def _new_classifier(class_names: Sequence[str]) -> str:
    return f"a new classifier of {len(class_names)} classes"


def _folded(config: ConfigDict) -> str:
    return "" if config.method == "batchnorm" else ", BatchNorms folded into the convolutions"


def _columns(source: RestoredNetwork, class_names: Sequence[str]) -> list[int] | None:
    """Of the source's logits, those of the run's classes, by name; None where some are new."""
    there = source.description.class_names
    if not set(class_names) <= set(there):
        return None
    return [there.index(name) for name in class_names]


def _of_classifier(
    source: RestoredNetwork, class_names: Sequence[str], columns: Sequence[int] | None
) -> str:
    if columns is None:
        return _new_classifier(class_names)
    there = source.description.class_names
    if tuple(class_names) == there:
        return "its classifier too"
    return f"its classifier for {len(columns)} of its {len(there)} classes, by name"


def check_strides(model: nnx.Module, source: nnx.Module) -> None:
    """Weights do not tell with which strides, and behind which pool, they are to be used.

    Raises:
      UserError: the two networks differ in these.
    """
    here, there = _strides(model), _strides(source)
    for path in here.keys() & there.keys():
        if here[path] != there[path]:
            raise UserError(
                f"{path} has the strides {here[path]} in this run, and {there[path]} there: the "
                "stem for large images, usual from 96 pixels on, and that for small ones compute "
                "different things: --config.network_options.stem=small or large"
            )


def _strides(network: nnx.Module) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, module in nnx.iter_modules(network):
        strides = getattr(module, "strides", None)
        if isinstance(module, nnx.Conv | ScaledConv) and strides is not None:
            window = module.kernel_size
            steps = (strides,) * len(window) if isinstance(strides, int) else tuple(strides)
            found["/".join(map(str, path))] = steps
    return found


def _put_layers(
    model: nnx.Module, config: ConfigDict, source: RestoredNetwork, columns: Sequence[int] | None
) -> str:
    """Writes the layers of a network of another method; says what became of its BatchNorms."""
    layers = layers_of(source.model)
    classifier = layers.pop(CLASSIFIER)
    if columns is not None:
        layers[CLASSIFIER] = _of_classes(classifier, columns)
    put_layers(model, layers, keep=(CLASSIFIER,) if columns is None else ())
    has_norms = any(layer.norm is not None for path, layer in layers.items() if path != CLASSIFIER)
    return _folded(config) if has_norms else ""


def _meaning(config: ConfigDict) -> Method:
    """What two runs must share for their parameters to mean the same: more than their shapes."""
    return dataclasses.replace(method_of(config), **_SAME_WHATEVER)


def _of_classes(layer: Layer, columns: Sequence[int]) -> Layer:
    """A classifier with some of its outputs."""
    bias, norm = layer.bias, layer.norm
    if norm is not None:
        arrays = {name: getattr(norm, name)[columns] for name in Norm._fields if name != "epsilon"}
        norm = norm._replace(**arrays)
    return Layer(layer.kernel[:, columns], None if bias is None else bias[columns], norm)


def _copy(
    model: nnx.Module, source: nnx.Module, columns: Sequence[int] | None, num_classes: int
) -> None:
    """Copies every array, of the classifier and what follows it those of some classes.

    Args:
      model: is changed.
      source: of the same method.
      columns: the outputs of ``source`` that are those of ``model``; None if none is.
      num_classes: of ``source``.

    Raises:
      UserError: an array of another shape.
    """
    there = _variables(source)
    writes: list[tuple[Any, Any]] = []
    other: list[str] = []
    for path, variable in _variables(model).items():
        value = there[path][...] if path in there else None
        if path[0] in _OF_CLASSES:
            if columns is None:
                continue
            if value is not None and value.ndim and value.shape[-1] == num_classes:
                value = value[..., np.asarray(columns)]
        if value is None or value.shape != variable[...].shape:
            said = "nothing" if value is None else f"{value.shape}"
            other.append(f"{'/'.join(map(str, path))} is {variable[...].shape}, and there {said}")
        else:
            writes.append((variable, value))
    if other:
        raise UserError(f"the weights do not fit the network: {listed(other)}")
    for variable, value in writes:
        variable[...] = jnp.asarray(value, variable[...].dtype)


def _variables(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
