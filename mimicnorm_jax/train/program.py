"""What a configuration compiles to: the state and the steps of a run, without its data."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of, network_options_of
from mimicnorm_jax.data.pipeline import steps_of
from mimicnorm_jax.methods import Method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.parallel import DATA_AXIS, check_batch_size, quick_compilation, replicated
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


class Images(NamedTuple):
    """What a program must know of the training images.

    Attributes:
      shape: height, width and channels.
      num_classes: number of classes.
      num_examples: in the training split.
      mean, std: of each channel, in units of 1.
    """

    shape: tuple[int, int, int]
    num_classes: int
    num_examples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled part of a run.

    Attributes:
      config: its configuration.
      mesh: the devices.
      network: the static structure of the network.
      epoch_steps: steps of ``config.epochs``.
      train_step, eval_step, moments_step: compiled at their first call.
      abstract_state: shapes and types of the state.
      depends_on_devices: whether the result depends on their number, see ``Method``.
    """

    config: ConfigDict
    mesh: Mesh
    network: Network
    epoch_steps: int
    train_step: TrainStep
    eval_step: EvalStep
    moments_step: EvalStep
    abstract_state: TrainState
    depends_on_devices: bool
    _create: Any

    def initial_state(self) -> TrainState:
        """The state at step 0, on every device of the mesh."""
        create = jax.jit(
            self._create,
            out_shardings=replicated(self.mesh),
            compiler_options=quick_compilation(self.mesh.devices.flat[0].platform),
        )
        return create()


def network_arguments(config: ConfigDict, images: Images) -> dict[str, Any]:
    """The arguments of ``create_model`` but for method and random numbers."""
    size, _, channels = images.shape
    return {
        "name": config.network,
        "num_classes": images.num_classes,
        "image_size": size,
        "channels": channels,
        "width": config.width,
        "precision": config.precision,
        **network_options_of(config),
    }


def make_program(
    config: ConfigDict, images: Images, mesh: Mesh, *, method: Method | None = None
) -> Program:
    """Builds the program of a configuration that has been validated.

    Args:
      config: the configuration.
      images: what is known of the training images.
      mesh: the devices, which need not be there if nothing is run.
      method: in place of the configured one.

    Raises:
      UserError: images, devices and configuration do not fit each other.
    """
    method = method or method_of(config, axis_name=DATA_AXIS)
    check_batch_size(config.batch_size, mesh, method, config.micro_batches)
    precision = resolve_precision(config.precision)
    arguments = network_arguments(config, images)

    def create() -> nnx.Module:
        return create_model(method=method, rngs=nnx.Rngs(config.seed), **arguments)

    def steps(epochs: float) -> Fraction:
        return steps_of(epochs, images.num_examples, config.batch_size)

    network, initial_values = split_network(create)
    epoch_steps = math.ceil(steps(config.epochs))
    schedule = make_schedule(config, steps, epoch_steps)
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

    common: dict[str, Any] = {
        "mesh": mesh,
        "precision": precision,
        "mean": images.mean,
        "std": images.std,
    }
    return Program(
        config=config,
        mesh=mesh,
        network=network,
        epoch_steps=epoch_steps,
        train_step=make_train_step(config, network, optimizer, schedule, **common),
        eval_step=make_eval_step(network, **common),
        moments_step=make_moments_step(network, **common),
        abstract_state=jax.eval_shape(create_initial),
        depends_on_devices=method.depends_on_devices,
        _create=create_initial,
    )
