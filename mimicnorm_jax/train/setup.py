"""From a configuration to everything a run needs, with nothing written to disk."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import xla_bridge
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax import kept
from mimicnorm_jax.config import LOCAL_FIELDS, validate
from mimicnorm_jax.data.sources import Source
from mimicnorm_jax.data.splits import splits_of
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.guest import guests
from mimicnorm_jax.parallel import connect, coordination, make_mesh
from mimicnorm_jax.parallel.backend import size_pool
from mimicnorm_jax.paths import expanded_text
from mimicnorm_jax.train.description import read_description
from mimicnorm_jax.train.experiment import Experiment, experiment_of, images_of
from mimicnorm_jax.train.init_from import find_pretrained, read_pretrained
from mimicnorm_jax.train.provenance import config_as_json
from mimicnorm_jax.train.workdir import data_identity


def configure_jax(config: ConfigDict) -> None:
    """Sets what must be set before the first computation.

    Raises:
      UserError: in a process where it is too late, or where another run needs it otherwise.
    """
    is_wide = config.precision == "float64"
    if guests() > 1 and is_wide != jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UserError(
            f"config.precision = {config.precision!r}: another run of this process computes with "
            "other types; wait for its end"
        )
    size_pool(config.cpu_threads)
    _keep_compiled_programs(config.compilation_cache)
    if is_wide:
        jax.config.update("jax_enable_x64", True)
    if config.deterministic:
        _choose_deterministic_kernels()


def _choose_deterministic_kernels() -> None:
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    elif jax.default_backend() != "cpu":  # which is deterministic
        raise UserError(
            f"config.deterministic is too late: JAX computes already; start with XLA_FLAGS={flag}"
        )


def _keep_compiled_programs(folder: str) -> None:
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # the default, 1 s, leaves out most of what a small network needs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if folder == "auto":
        if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            return  # the environment says where
        folder = str(kept.cache_folder())
    folder = expanded_text(folder)
    if folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError:  # a machine without a home: every start compiles
            return
    jax.config.update("jax_compilation_cache_dir", folder or None)


def silence_false_alarms(mesh: Mesh) -> None:
    """On some processors XLA calls its own CPU programs from the cache unfit, at great length.

    It compares the features of the processor with a list to which it adds preferences of its
    own. JAX_LOGGING_LEVEL brings the messages back.
    """
    if mesh.devices.flat[0].platform == "cpu" and "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")


def set_up_together(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
    """``set_up`` in every process of a run.

    Raises:
      UserError: also where the processes were not started alike, or see other images.
    """
    check_same_configuration(config)
    mesh = coordination.together("devices", lambda: make_mesh(config.num_devices))
    connect(mesh)
    experiment = coordination.together("set-up", lambda: set_up(config, workdir))
    check_same_images(experiment.splits._asdict())
    # A process that has its images in memory measures all of them, exactly, and another some.
    mean, std = experiment.images.mean, experiment.images.std
    _check_alike("normalization", {"the images' mean and std (config.data.mean)": [*mean, *std]})
    if (pretrained := experiment.pretrained) is not None:
        _check_alike("init_from", {"the weights of config.init_from": pretrained.sha256})
    return experiment


def check_same_configuration(config: ConfigDict) -> None:
    """Raises ``UserError`` unless every process of a run has the same configuration."""
    said = {"JAX": jax.__version__} | {
        f"config.{name}": value
        for name, value in config_as_json(config).items()
        if name not in LOCAL_FIELDS
    }
    _check_alike("configuration", said)


def check_same_images(splits: Mapping[str, Source | None]) -> None:
    """Raises ``UserError`` unless every process of a run sees the same splits."""
    for split, identity in data_identity(splits).items():
        _check_alike("data", {f"{split} {name}": value for name, value in identity.items()})


def _check_alike(what: str, said: dict[str, Any]) -> None:
    """Raises ``UserError`` unless every process says the same."""
    first, *others = coordination.exchange(what, said)
    for process, other in enumerate(others, start=1):
        for name in first:
            if other.get(name) != first[name]:
                raise UserError(
                    f"the processes differ in {name}: {first[name]!r} in process 0, "
                    f"{other.get(name)!r} in process {process}"
                )


def set_up(config: ConfigDict, workdir: pathlib.Path | None = None) -> Experiment:
    """Builds a run from its configuration.

    Args:
      config: the configuration.
      workdir: of a run that may have begun; it is only read.

    Raises:
      UserError: whatever is wrong with the configuration, the data, the devices, or
        their combination.
    """
    validate(config)
    configure_jax(config)
    mesh = make_mesh(config.num_devices)
    silence_false_alarms(mesh)
    splits = splits_of(config)
    pretrained = read_pretrained(config) if workdir is None else find_pretrained(config, workdir)
    begun = None if workdir is None else read_description(workdir)
    before = None if begun is None else begun.images
    images = images_of(config, splits.train, pretrained, before)
    experiment = experiment_of(config, images, mesh, splits)
    if pretrained is None:
        return experiment
    start = experiment.start_from(pretrained) if pretrained.put else None
    return dataclasses.replace(experiment, pretrained=pretrained, start=start)
