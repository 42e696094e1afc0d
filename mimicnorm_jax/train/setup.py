"""From a configuration to everything a run needs, with nothing written to disk."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of, network_options_of, validate
from mimicnorm_jax.data.pipeline import Pipeline, Workers
from mimicnorm_jax.data.random_crop import RandomResizedCrop
from mimicnorm_jax.data.sources import Source, channel_statistics
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.models import create_model
from mimicnorm_jax.parallel import (
    DATA_AXIS,
    check_batch_size,
    make_mesh,
    quick_compilation,
    replicated,
)
from mimicnorm_jax.precision import resolve_precision
from mimicnorm_jax.train.optim import make_optimizer, make_schedule
from mimicnorm_jax.train.state import Network, TrainState, create_state, split_network
from mimicnorm_jax.train.step import (
    EvalStep,
    TrainStep,
    make_eval_step,
    make_moments_step,
    make_train_step,
)


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
      abstract_state: shapes, types and shardings of the state.
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
    _create: Any

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
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    if config.deterministic:
        flag = "--xla_gpu_deterministic_ops=true"
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


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
    common = {"batch_size": config.batch_size, "seed": config.seed, "workers": workers}
    return Pipeline(train, crop=crop, **common), Pipeline(test, **common)


def set_up(config: ConfigDict) -> Experiment:
    """Builds a run from its configuration.

    Raises:
      UserError: whatever is wrong with the configuration, the data, the devices, or
        their combination.
    """
    validate(config)
    configure_jax(config)
    mesh = make_mesh(config.num_devices)
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
        return create_state(initial_values, optimizer, ema=config.optimizer.ema_decay > 0)

    channel_values = normalization(config, train)
    sharding = replicated(mesh)
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
        abstract_state=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(create_initial),
        ),
        _create=create_initial,
    )
