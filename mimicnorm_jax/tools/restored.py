"""The state of a run, for programs that look into it."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import TrainState
from mimicnorm_jax.train.workdir import other_fields


def restore(config: ConfigDict, workdir: pathlib.Path) -> TrainState:
    """The latest state of a run.

    Args:
      config: that of the run.
      workdir: its folder, as ``--checkpoint`` says.

    Raises:
      UserError: it is none, of another configuration, or has no checkpoint that can be read.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir() or not (workdir / "config.json").is_file():
        raise UserError(f"--checkpoint={workdir} is not the folder of a run with checkpoints")
    if differing := other_fields(workdir, config):
        raise UserError(
            f"--checkpoint={workdir} is a run of another configuration: {differing}; give the "
            "same --config fields"
        )
    restored = Checkpoints(directory).restore_latest(set_up(config).abstract_state, set_aside=False)
    if restored is None:
        raise UserError(f"--checkpoint={workdir} has no checkpoint that can be read")
    return jax.tree.map(jnp.asarray, restored.state)
