"""From the folder of a run to its network, with no more of the data than that needs."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.data.splits import Splits, splits_of
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import DATA_AXIS, replicate
from mimicnorm_jax.parallel.backend import started
from mimicnorm_jax.train.calibrated import read_calibration
from mimicnorm_jax.train.checkpoint import Checkpoints, Restored
from mimicnorm_jax.train.description import Description, check_network, read_description
from mimicnorm_jax.train.evaluation import averaged
from mimicnorm_jax.train.experiment import experiment_of, images_of
from mimicnorm_jax.train.metrics import accuracies
from mimicnorm_jax.train.program import make_program
from mimicnorm_jax.train.state import TrainState
from mimicnorm_jax.train.workdir import check_data, data_identity, saved_config


class RestoredNetwork(NamedTuple):
    """The network of a run.

    Attributes:
      config: the run's.
      description: of the images it was trained on.
      model: in evaluation mode.
      step: of its checkpoint.
      temperature: of its probabilities; None where there is none.
    """

    config: ConfigDict
    description: Description
    model: nnx.Module
    step: int
    temperature: float | None


def restore(workdir: pathlib.Path, which: str) -> RestoredNetwork:
    """Reads the ``"best"`` checkpoint or the ``"latest"``.

    Raises:
      UserError: see ``mimicnorm_jax.load``.
    """
    config = saved_config(workdir)
    check_network(workdir, config)
    if config.precision == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UserError(
            f"{workdir} was trained in float64: first jax.config.update('jax_enable_x64', True)"
        )
    here = config.copy_and_resolve_references()
    here.num_devices = 1
    description = read_description(workdir) or _described_by_data(workdir, here)
    # One device of this process: each of several may read.
    mesh = Mesh(np.array(started(jax.local_devices)[:1]), (DATA_AXIS,))
    program = make_program(here, description.images, mesh)
    restored = _read(workdir, which, program.abstract_state)
    if jax.tree.map(np.shape, restored.state) != jax.tree.map(np.shape, program.abstract_state):
        raise UserError(f"{workdir} has a checkpoint of another network than its config.json says")
    state: TrainState = jax.tree.map(jnp.asarray, restored.state)
    if state.ema_params is not None and jax.tree.leaves(state.batch_stats):
        splits = _opened(workdir, here, "the statistics of its averaged parameters")
        experiment = experiment_of(here, description.images, mesh, splits)
        state = averaged(experiment, replicate(restored.state, mesh))
    values = state.evaluated_params, state.batch_stats
    model = nnx.merge(program.network.eval_graph, *values, copy=True)
    step = int(restored.state.step)
    calibration = read_calibration(workdir, step)
    temperature = None if calibration is None else calibration["temperature"]
    return RestoredNetwork(config, description, model, step, temperature)


def _read(workdir: pathlib.Path, which: str, target: TrainState) -> Restored:
    checkpoints = Checkpoints(workdir / "checkpoints")
    if which == "best":
        return checkpoints.restore_best(target, accuracies(workdir))
    restored = checkpoints.restore_latest(target, set_aside=False)
    if restored is None:
        raise UserError(f"{checkpoints.directory} has no checkpoint")
    return restored


def _described_by_data(workdir: pathlib.Path, config: ConfigDict) -> Description:
    train = _opened(workdir, config, "its classes, which an earlier version did not keep").train
    return Description.of(config, train, images_of(config, train))


def _opened(workdir: pathlib.Path, config: ConfigDict, for_what: str) -> Splits:
    try:
        splits = splits_of(config)
        check_data(workdir, data_identity(splits._asdict()))
    except UserError as error:
        raise UserError(f"{workdir} needs its training images for {for_what}: {error}") from error
    return splits
