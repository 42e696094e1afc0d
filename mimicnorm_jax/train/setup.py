"""From a configuration to everything a run needs, with nothing written to disk."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import LOCAL_FIELDS, method_of, network_options_of, validate
from mimicnorm_jax.data.pipeline import Pipeline, Workers, prefetch
from mimicnorm_jax.data.random_crop import RandomResizedCrop
from mimicnorm_jax.data.sources import Source, channel_statistics
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models import create_model
from mimicnorm_jax.parallel import (
    DATA_AXIS,
    check_batch_size,
    coordination,
    make_mesh,
    quick_compilation,
    replicated,
    shard_batch,
)
from mimicnorm_jax.precision import resolve_precision
from mimicnorm_jax.train.optim import make_optimizer, make_schedule
from mimicnorm_jax.train.provenance import config_as_json
from mimicnorm_jax.train.state import Network, TrainState, create_state, split_network
from mimicnorm_jax.train.step import (
    EvalStep,
    TrainStep,
    make_eval_step,
    make_moments_step,
    make_train_step,
)
from mimicnorm_jax.train.workdir import DataIdentity, data_identity


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to start.

    Attributes:
      config: its configuration.
      mesh: the devices.
      network: the static structure of the network.
      train_data: training batches by step.
      test_data: the test split.
      total_steps: length of the run.
      train_step, eval_step, moments_step: compiled at their first call.
      abstract_state: shapes and types of the state.
      depends_on_devices: whether the result depends on their number, see ``Method``.
    """

    config: ConfigDict
    mesh: Mesh
    network: Network
    train_data: Pipeline
    test_data: Pipeline
    total_steps: int
    train_step: TrainStep
    eval_step: EvalStep
    moments_step: EvalStep
    abstract_state: TrainState
    depends_on_devices: bool
    _create: Any

    @property
    def data_identity(self) -> DataIdentity:
        """What tells the images of this run from others, wherever they are stored."""
        return data_identity(self.train_data.source, self.test_data.source)

    def batches(self, first: int, last: int) -> Generator[Any]:
        """The training batches of steps ``first`` to ``last`` (not included), on the devices."""
        host = self.train_data.batches(first, last)
        return prefetch(host, lambda batch: shard_batch(batch, self.mesh))

    def initial_state(self) -> TrainState:
        """The state at step 0, on every device of the mesh."""
        create = jax.jit(
            self._create,
            out_shardings=replicated(self.mesh),
            compiler_options=quick_compilation(self.mesh.devices.flat[0].platform),
        )
        return create()


def configure_jax(config: ConfigDict) -> None:
    """Sets what must be set before the first computation."""
    _keep_compiled_programs(config.compilation_cache)
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    if config.deterministic:
        flag = "--xla_gpu_deterministic_ops=true"
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _keep_compiled_programs(folder: str) -> None:
    if folder == "auto":
        if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            return  # the environment says where
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = str(pathlib.Path(home).expanduser() / "mimicnorm_jax")
    if folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError:  # a machine without a home: every start compiles
            return
    jax.config.update("jax_compilation_cache_dir", folder or None)
    # the default, 1 s, leaves out most of what a small network needs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _silence_false_alarms(mesh: Mesh) -> None:
    """On some processors XLA calls its own CPU programs from the cache unfit, at great length.

    It compares the features of the processor with a list to which it adds preferences of its
    own. JAX_LOGGING_LEVEL brings the messages back.
    """
    if mesh.devices.flat[0].platform == "cpu" and "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")


def network_arguments(config: ConfigDict, train: Source) -> dict[str, Any]:
    """The arguments of ``create_model`` but for method and random numbers."""
    size, _, channels = train.image_shape
    return {
        "name": config.network,
        "num_classes": len(train.class_names),
        "image_size": size,
        "channels": channels,
        "width": config.width,
        "precision": config.precision,
        **network_options_of(config),
    }


def normalization(config: ConfigDict, train: Source) -> dict[str, tuple[float, ...]]:
    """``mean`` and ``std`` of the channels: those of the configuration, or measured."""
    mean, std = (
        (np.array(config.data.mean), np.array(config.data.std))
        if config.data.mean
        else channel_statistics(train)
    )
    return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}


def pipelines(config: ConfigDict, train: Source, test: Source) -> tuple[Pipeline, Pipeline]:
    """The configured pipelines of the two splits."""
    data = config.data
    crop = None
    if data.random_resized_crop:
        crop = RandomResizedCrop(tuple(data.crop_scale), tuple(data.crop_ratio))
    workers = Workers(data.threads or Workers.threads, data.processes)
    common = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "workers": workers,
        "process_index": coordination.process_index(),
        "process_count": coordination.process_count(),
    }
    return Pipeline(train, crop=crop, **common), Pipeline(test, **common)


def set_up_together(config: ConfigDict) -> Experiment:
    """``set_up`` in every process of a run.

    Raises:
      UserError: also where the processes were not started alike, or see other images.
    """
    said = {"JAX": jax.__version__} | {
        f"config.{name}": value
        for name, value in config_as_json(config).items()
        if name not in LOCAL_FIELDS
    }
    _check_alike("configuration", said)
    experiment = coordination.together("set-up", lambda: set_up(config))
    for split, identity in experiment.data_identity.items():
        _check_alike("data", {f"{split} {name}": value for name, value in identity.items()})
    return experiment


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


def set_up(config: ConfigDict) -> Experiment:
    """Builds a run from its configuration.

    Raises:
      UserError: whatever is wrong with the configuration, the data, the devices, or
        their combination.
    """
    validate(config)
    configure_jax(config)
    mesh = make_mesh(config.num_devices)
    _silence_false_alarms(mesh)
    method = method_of(config, axis_name=DATA_AXIS)
    check_batch_size(config.batch_size, mesh, method)
    train, test = open_splits(config.data)
    precision = resolve_precision(config.precision)
    arguments = network_arguments(config, train)

    def create() -> nnx.Module:
        return create_model(method=method, rngs=nnx.Rngs(config.seed), **arguments)

    network, initial_values = split_network(create)
    train_data, test_data = pipelines(config, train, test)
    epoch_steps = math.ceil(train_data.steps(config.epochs))
    schedule = make_schedule(config, train_data.steps, epoch_steps)
    abstract_params, _ = jax.eval_shape(initial_values)
    optimizer = make_optimizer(
        config,
        schedule,
        abstract_params,
        network.weight_mean_mask,
        scalar_rate=method.scalar_rate,
    )

    def create_initial() -> TrainState:
        return create_state(
            initial_values,
            optimizer,
            ema=config.optimizer.ema_decay > 0,
            counts_skips=config.on_nonfinite == "skip",
        )

    channel_values = normalization(config, train)
    return Experiment(
        config=config,
        mesh=mesh,
        network=network,
        train_data=train_data,
        test_data=test_data,
        total_steps=min(epoch_steps, config.max_steps or epoch_steps),
        train_step=make_train_step(
            config, network, optimizer, schedule, mesh=mesh, precision=precision, **channel_values
        ),
        eval_step=make_eval_step(network, mesh=mesh, precision=precision, **channel_values),
        moments_step=make_moments_step(network, mesh=mesh, precision=precision, **channel_values),
        abstract_state=jax.eval_shape(create_initial),
        depends_on_devices=method.depends_on_devices,
        _create=create_initial,
    )
