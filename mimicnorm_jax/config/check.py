"""The one check of a configuration, and the method and options that it asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mimicnorm_jax.config.data import ENCODED, GENERATED
from mimicnorm_jax.config.fields import FIELDS, default_config, flatten
from mimicnorm_jax.errors import UserError, shown, unknown
from mimicnorm_jax.methods import METHODS, Method, create_method
from mimicnorm_jax.models import network_options

_LARGEST = 2**40  # whole number: beyond it is a slip of the hand, in every field


def validate(config: ConfigDict) -> None:
    """Checks every field and how they fit together; reads no file, starts no backend.

    Raises:
      UserError: naming the field, its value and what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the configuration is a {type(config).__name__}, not a ConfigDict; a config file's "
            "get_config() starts from default_config() and returns it"
        )
    values = flatten(config)
    for name in values:
        if name not in FIELDS:
            raise unknown("field", f"config.{name}", [f"config.{known}" for known in FIELDS])
    for name, field in FIELDS.items():
        if name not in values:
            raise UserError(f"config.{name} is missing; start from default_config()")
        value = values[name]
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"config.{name} = {shown(value)} is not allowed: it has a zero byte")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"config.{name} = {shown(value)} is not allowed: it is too large")
        if value is None and field.default is None:
            continue
        if field.choices and value not in field.choices:
            raise unknown(f"config.{name}", value, field.choices)
        if not field.accepts(value):
            raise UserError(
                f"config.{name} = {shown(value)} is not allowed; allowed: {field.allowed}"
            )
    _validate_schedule(config)
    _validate_data(config)
    method_of(config)
    network_options_of(config)


def _validate_schedule(config: ConfigDict) -> None:
    milestones = list(config.schedule.milestones)
    if milestones != sorted(set(milestones)):
        raise UserError(
            f"config.schedule.milestones = {tuple(milestones)} are out of order; "
            "allowed: increasing epochs"
        )


def _validate_data(config: ConfigDict) -> None:
    data = config.data
    held = {
        "folder": f"{data.train_split}/<class>/*.jpg",
        "idx": "train-images-idx3-ubyte.gz and its like",
        "webdataset": "the .tar files",
    }
    if data.name in held and not data.dir:
        raise UserError(
            f"config.data.dir is not set; data.name = {data.name!r} needs the directory that holds "
            f"{held[data.name]}: --config.data.dir=DIR"
        )
    if data.name == "tfds" and not data.tfds_name:
        raise UserError("config.data.tfds_name is not set; data.name = 'tfds' needs one")
    if data.name in GENERATED and (data.dir or data.test_split != default_config().data.test_split):
        raise UserError(
            f"config.data.dir = {data.dir!r}, config.data.test_split = {data.test_split!r}: data.name "
            f"= {data.name!r} reads no files; for images in class folders: "
            "--config.data.name=folder"
        )
    if data.labels_file and data.name != "folder":
        raise UserError(
            f"config.data.labels_file = {data.labels_file!r} goes with data.name = 'folder', not "
            f"{data.name!r}"
        )
    if not data.train_split:
        raise UserError("config.data.train_split is empty; it names the training images")
    if not data.test_split and (data.name not in ENCODED or not data.holdout):
        raise UserError(
            f"config.data.test_split is empty with data.name = {data.name!r} and data.holdout = "
            f"{data.holdout}; allowed: for {', '.join(ENCODED)}, with images held out: "
            "--config.data.holdout=0.1"
        )
    if data.resize is not None and data.resize < data.image_size:
        raise UserError(
            f"config.data.resize = {data.resize} is below "
            f"config.data.image_size = {data.image_size}"
        )
    if len(data.mean) != len(data.std):
        raise UserError(
            f"config.data.mean has {len(data.mean)} values and config.data.std "
            f"{len(data.std)}; allowed: the same number"
        )
    if data.pad_crop >= data.image_size:
        raise UserError(
            f"config.data.pad_crop = {data.pad_crop} is not below "
            f"config.data.image_size = {data.image_size}"
        )


def method_of(config: ConfigDict, *, axis_name: str | None = None) -> Method:
    """The configured method.

    Args:
      config: the configuration.
      axis_name: mapped axis over which batch statistics are averaged.

    Raises:
      UserError: an option that is set but that the method does not have.
    """
    options = {name: v for name, v in config.method_options.items() if v is not None}
    fields = {field.name for field in dataclasses.fields(METHODS[config.method])}
    options |= {name: config[name] for name in ("weight_mean", "center") if name in fields}
    for option in options:
        if option not in fields:
            raise UserError(
                f"config.method_options.{option} does not apply to method {config.method!r}"
            )
    method = create_method(
        config.method,
        axis_name=axis_name,
        activation_storage=config.activation_storage,
        remat=config.remat,
        **options,
    )
    if config.micro_batches > 1 and method.couples_examples:
        raise UserError(
            f"config.micro_batches = {config.micro_batches} does not go with method "
            f"{config.method!r}, whose inner layers normalize over the batch: parts of it have "
            "other statistics than the whole, and so another gradient; allowed: 1"
        )
    return method


def network_options_of(config: ConfigDict) -> dict[str, Any]:
    """The network options that are set.

    Raises:
      UserError: an option that the network does not have.
    """
    options = {name: v for name, v in config.network_options.items() if v is not None}
    allowed = network_options(config.network)
    for option in options:
        if option not in allowed:
            raise UserError(
                f"config.network_options.{option} does not apply to network "
                f"{config.network!r}; its options: {', '.join(allowed) or 'none'}"
            )
    return options
