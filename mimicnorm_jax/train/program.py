"""What a configuration compiles to: the state and the steps of a run, without its data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of, network_options_of
from mimicnorm_jax.data.pipeline import steps_of
from mimicnorm_jax.methods import Method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.parallel import (
    DATA_AXIS,
    check_batch_size,
    quick_compilation,
    replicate,
    replicated,
)
from mimicnorm_jax.precision import resolve_precision
from mimicnorm_jax.train.optim import make_optimizer, make_schedule
from mimicnorm_jax.train.state import Network, TrainState, create_state, split_network
from mimicnorm_jax.train.step import (
    EvalStep,
    Metrics,
    SeveralSteps,
    StatisticsStep,
    TrainStep,
    make_eval_step,
    make_logits_step,
    make_moments_step,
    make_several_steps,
    make_statistics_step,
    make_train_step,
)

Values = tuple[Any, Any]  # trees of parameters and of statistics, as host arrays


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
      train_step, several_steps, eval_step, logits_step, moments_step, statistics_step: compiled
        at their first call.
      steps_per_call: ``config.steps_per_call``, and 1 on CPUs: XLA's convolutions are slow in
        loops there.
      abstract_state: shapes and types of the state.
      depends_on_devices: whether the result depends on their number, see ``Method``.
    """

    config: ConfigDict
    mesh: Mesh
    network: Network
    epoch_steps: int
    train_step: TrainStep
    several_steps: SeveralSteps
    steps_per_call: int
    eval_step: EvalStep
    logits_step: EvalStep
    moments_step: EvalStep
    statistics_step: StatisticsStep
    abstract_state: TrainState
    depends_on_devices: bool
    _create: Any

    def initial_state(self, values: Values | None = None) -> TrainState:
        """The state at step 0, on every device of the mesh.

        Args:
          values: parameters and statistics as host arrays, in place of random ones.
        """
        create = jax.jit(
            self._create,
            out_shardings=replicated(self.mesh),
            compiler_options=quick_compilation(self.mesh.devices.flat[0].platform),
        )
        return create(None if values is None else replicate(values, self.mesh))

    def train(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Metrics]:
        """Runs one step for each batch, in one call of the devices.

        Args:
          state: before the first step; it is donated.
          batches: at most ``steps_per_call``, on the devices: nothing else moves there.

        Returns:
          The state after the last step; metrics, of which the first ``len(batches)`` entries
          count where ``steps_per_call`` is above 1.
        """
        most = self.steps_per_call
        if most > 1:
            count = replicate(np.array(len(batches), np.int32), self.mesh)
        with jax.transfer_guard("disallow"):
            if most == 1:
                (batch,) = batches
                return self.train_step(state, batch)
            filled = (*batches, *[batches[-1]] * (most - len(batches)))
            return self.several_steps(state, filled, count)


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

    def create_initial(values: Values | None = None) -> TrainState:
        return create_state(
            initial_values if values is None else lambda: values,
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
    train_step = make_train_step(config, network, optimizer, schedule, **common)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Program(
        config=config,
        mesh=mesh,
        network=network,
        epoch_steps=epoch_steps,
        train_step=train_step,
        several_steps=make_several_steps(train_step),
        steps_per_call=1 if on_cpu else config.steps_per_call,
        eval_step=make_eval_step(network, **common),
        logits_step=make_logits_step(network, **common),
        moments_step=make_moments_step(network, **common),
        statistics_step=make_statistics_step(config, network, **common),
        abstract_state=jax.eval_shape(create_initial),
        depends_on_devices=method.depends_on_devices,
        _create=create_initial,
    )
