"""The network of an exported folder, built again."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mimicnorm_jax.config import default_config, flatten, method_of, validate
from mimicnorm_jax.convert import fold
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export.metadata import FORMAT
from mimicnorm_jax.export.safetensors import CONFIG, WEIGHTS, load_safetensors
from mimicnorm_jax.models import create_model
from mimicnorm_jax.train.description import Description, parse_description
from mimicnorm_jax.train.json_files import NUMBER_OR_NULL, check_kinds, read_json
from mimicnorm_jax.train.program import network_arguments
from mimicnorm_jax.train.restored import RestoredNetwork
from mimicnorm_jax.train.workdir import with_fields

# What decides which network a run has. Its other fields say where data lie, and need not travel.
_OF_NETWORK = ("network", "method", "width", "weight_mean", "center")
_GROUPS = ("network_options.", "method_options.")


def fields_to_build(config: ConfigDict, description: Description) -> dict[str, Any]:
    """What ``restore_export`` must know of a run."""
    fields = {
        name: value
        for name, value in flatten(config).items()
        if name in _OF_NETWORK or (name.startswith(_GROUPS) and value is not None)
    }
    return {"config": fields, "description": description.as_json()}


def is_export(folder: pathlib.Path) -> bool:
    """Whether a folder is that of ``export_safetensors``."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def restore_export(folder: pathlib.Path) -> RestoredNetwork:
    """Builds the network of an exported run, folded, and loads its weights.

    Raises:
      UserError: it is no export of a run, of a later version, or damaged.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {values.get('format')}, and this version of mimicnorm-jax reads "
            f"{FORMAT}"
        )
    if not values.get("build"):
        raise UserError(
            f"{folder} was exported from a network of your own: build and fold it, and load it by "
            "mimicnorm_jax.load_safetensors(folded, folder)"
        )
    build = check_kinds(values, {"build": dict, "run": dict}, str(path))["build"]
    check_kinds(build, {"config": dict, "description": dict}, f"{path}: build")
    step = check_kinds(values["run"], {"step": int}, f"{path}: run")["step"]
    temperature = check_kinds(values, {"temperature": NUMBER_OR_NULL}, str(path))["temperature"]
    if temperature is not None and temperature <= 0:
        raise UserError(f"{path} is damaged: temperature is {temperature:g}, not above 0")
    try:
        config = with_fields(default_config(), build["config"], path)
        validate(config)
        description = parse_description(build["description"], str(path))
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    config.precision = "float32"
    arguments = network_arguments(config, description.images)
    model = create_model(method=method_of(config), rngs=nnx.Rngs(0), **arguments)
    images = jnp.zeros((1, *description.images.shape), jnp.float32)
    network = fold(model, images).network
    load_safetensors(network, folder)
    return RestoredNetwork(config, description, network, step, temperature)
