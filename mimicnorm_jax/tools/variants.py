"""One configuration in several variants, such as methods side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from mimicnorm_jax.config import FIELDS, method_of, validate
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.methods import METHODS, BatchNorm, Function, Method, Site
from mimicnorm_jax.models import BRANCHED
from mimicnorm_jax.parallel import DATA_AXIS

PLAIN = "plain"
# what is the same for all variants of one report
_OF_THE_RUN = ("method", "num_devices", "compilation_cache", "deterministic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainBatchNorm(BatchNorm):
    """BatchNorm of Flax's own layers: what shows that ours is no heavier.

    ``nnx.Conv``, ``nnx.BatchNorm`` and ``nnx.relu`` in this project's networks, whose max-pools
    it shares.
    """

    name = PLAIN

    def norm(self, features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        ours = super().norm(features, site=site, rngs=rngs)
        if not isinstance(ours, ShiftedBatchNorm):
            return ours
        return nnx.BatchNorm(
            features,
            momentum=ours.momentum,
            epsilon=ours.epsilon,
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            axis_name=ours.axis_name,
            rngs=rngs,
        )

    def activation(self, *, site: Site) -> Function:
        return nnx.relu

    def conv_layer(self, fan_in: int, site: Site) -> Callable[..., Function]:
        ours: Any = Method.conv_layer(self, fan_in, site)
        return functools.partial(nnx.Conv, **ours.keywords)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A configuration under a name.

    Attributes:
      label: as it was asked for, such as ``"mimicnorm:remat=block"``.
      config: complete and valid.
      method: what it is built with.
    """

    label: str
    config: ConfigDict
    method: Method


def options_of(method: str) -> set[str]:
    """Names of the options that a method has."""
    return {field.name for field in dataclasses.fields(METHODS[method])}


def with_method(config: ConfigDict, method: str) -> ConfigDict:
    """The configuration with another method, without the options that it does not have."""
    config = copy.deepcopy(config)
    for option in config.method_options:
        if option not in options_of(method):
            config.method_options[option] = None
    config.method = method
    return config


def check_options(config: ConfigDict, methods: Sequence[str]) -> None:
    """Checks the configuration with each method; an option has to be one of some method.

    Raises:
      UserError: what does not fit.
    """
    _check_some_method_has_the_options(config, methods)
    for method in methods:
        validate(with_method(config, method))


def _check_some_method_has_the_options(config: ConfigDict, methods: Sequence[str]) -> None:
    for option, value in config.method_options.items():
        if value is not None and not any(option in options_of(method) for method in methods):
            raise UserError(
                f"config.method_options.{option} does not apply to {' or '.join(methods)}"
            )


def _method_named(name: str) -> str:
    return "batchnorm" if name == PLAIN else name


def fitting_methods(config: ConfigDict, methods: Sequence[str]) -> list[str]:
    """Those of the methods that fit the network of a configuration."""
    branched = config.network in BRANCHED
    return [name for name in methods if branched or not METHODS[name].needs_branches]


def parse_variants(config: ConfigDict, labels: Sequence[str]) -> list[Variant]:
    """Variants of a configuration.

    Args:
      config: what they start from.
      labels: each a method, or ``"plain"``, and after colons fields that it sets, such as
        ``"mimicnorm:activation_storage=int8:micro_batches=4"``.

    Raises:
      UserError: an unknown method or field, or what does not fit.
    """
    if not labels:
        raise UserError("--methods= is empty; leave it out for the usual ones")
    names = [label.partition(":")[0] for label in labels]
    for name in names:
        if name not in METHODS and name != PLAIN:
            raise unknown("--methods", name, (*METHODS, PLAIN))
    _check_some_method_has_the_options(config, [_method_named(name) for name in names])
    return [_variant(config, label) for label in dict.fromkeys(labels)]


def _parse(label: str, field: str, value: str) -> Any:
    """The value of a field that is a word, a number, or true or false."""
    kind = FIELDS[field].kind or type(FIELDS[field].default)
    if kind is bool and value in ("true", "false"):
        return value == "true"
    with contextlib.suppress(ValueError):
        if kind in (str, int, float) and value:
            return kind(value)
    raise UserError(f"--methods={label}: {field}={value} sets no {kind.__name__}")


def _variant(config: ConfigDict, label: str) -> Variant:
    name, *settings = label.split(":")
    changed = with_method(config, _method_named(name))
    allowed = [field for field in FIELDS if field not in _OF_THE_RUN]
    for setting in settings:
        field, _, value = setting.partition("=")
        if field not in allowed:
            raise unknown(f"field in --methods={label}:", field, allowed)
        changed.update_from_flattened_dict({field: _parse(label, field, value)})
    validate(changed)
    if name == PLAIN and changed.activation_storage != "full":
        raise UserError(f"--methods={label}: Flax's own convolutions keep their inputs as they are")
    method = method_of(changed, axis_name=DATA_AXIS)
    if name == PLAIN:
        method = PlainBatchNorm(**vars(method))
    if method.needs_branches and changed.network not in BRANCHED:
        raise UserError(f"--methods={label}: {changed.network} has no residual branches")
    return Variant(label, changed, method)
