"""One configuration in several variants, such as methods side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flax import nnx
from ml_collections import ConfigDict

from mimicnorm_jax.config import FIELDS, method_of, validate
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.methods import METHODS, BatchNorm, Function, Method, Site
from mimicnorm_jax.models import BRANCHED
from mimicnorm_jax.parallel import DATA_AXIS

PLAIN = "plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainBatchNorm(BatchNorm):
    """BatchNorm of Flax's own layers only: what shows that ours is no heavier.

    ``nnx.Conv`` and ``nnx.BatchNorm`` with this project's initial values.
    """

    name = PLAIN

    def conv(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        site: Site,
        strides: int = 1,
        padding: int = 0,
        feature_group_count: int = 1,
        rngs: nnx.Rngs,
    ) -> Function:
        return nnx.Conv(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            feature_group_count=feature_group_count,
            use_bias=self.use_bias(site),
            dtype=self.precision.dtype,
            param_dtype=self.precision.param_dtype,
            rngs=rngs,
        )


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
    config = ConfigDict(config)
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
    for option, value in config.method_options.items():
        if value is not None and not any(option in options_of(method) for method in methods):
            raise UserError(
                f"config.method_options.{option} does not apply to {' or '.join(methods)}"
            )
    for method in methods:
        validate(with_method(config, method))


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
    names = [label.partition(":")[0] for label in labels]
    for name in names:
        if name not in METHODS and name != PLAIN:
            raise unknown("--methods", name, (*METHODS, PLAIN))
    check_options(config, ["batchnorm" if name == PLAIN else name for name in names])
    return [_variant(config, label) for label in dict.fromkeys(labels)]


def _variant(config: ConfigDict, label: str) -> Variant:
    name, *settings = label.split(":")
    changed = with_method(config, "batchnorm" if name == PLAIN else name)
    for setting in settings:
        field, equals, value = setting.partition("=")
        if field not in FIELDS:
            raise unknown(f"field in --methods={label}:", field, FIELDS)
        kind = FIELDS[field].kind or type(FIELDS[field].default)
        try:
            parsed = value if kind is str else kind(value) if equals and kind is not bool else None
        except ValueError:
            parsed = None
        if parsed is None:
            raise UserError(f"--methods={label}: {setting!r} sets no {kind.__name__}")
        changed.update_from_flattened_dict({field: parsed})
    validate(changed)
    method = method_of(changed, axis_name=DATA_AXIS)
    if name == PLAIN:
        method = PlainBatchNorm(**vars(method))
    if method.needs_branches and changed.network not in BRANCHED:
        raise UserError(f"--methods={label}: {changed.network} has no residual branches")
    return Variant(label, changed, method)
