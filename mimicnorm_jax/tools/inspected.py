"""What programs look into: the state of a run, and some of its images."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mimicnorm_jax.data.augment import normalize
from mimicnorm_jax.data.pipeline import Pipeline
from mimicnorm_jax.data.splits import splits_of
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.parallel import make_mesh
from mimicnorm_jax.precision import resolve_precision
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.description import check_network
from mimicnorm_jax.train.experiment import images_of
from mimicnorm_jax.train.init_from import read_pretrained
from mimicnorm_jax.train.program import Images
from mimicnorm_jax.train.setup import set_up, silence_false_alarms
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
    with refused_by_system(f"--checkpoint={workdir} cannot be read"):
        is_run = directory.is_dir() and (workdir / "config.json").is_file()
    if not is_run:
        raise UserError(f"--checkpoint={workdir} is not the folder of a run with checkpoints")
    if differing := other_fields(workdir, config):
        raise UserError(
            f"--checkpoint={workdir} is a run of another configuration: {differing}; give the "
            "same --config fields"
        )
    check_network(workdir, config)
    target = set_up(config, workdir).abstract_state
    restored = Checkpoints(directory).restore_latest(target, set_aside=False)
    if restored is None:
        raise UserError(f"--checkpoint={workdir} has no checkpoint that can be read")
    return jax.tree.map(jnp.asarray, restored.state)


def training_images(config: ConfigDict, count: int) -> tuple[Images, jax.Array, jax.Array]:
    """The first images that a run trains on, without augmentation.

    Args:
      config: that of the run.
      count: how many, as ``--images`` says.

    Returns:
      What is known of all images; ``count`` of them, normalized, ``(count, H, W, C)``; their
      labels ``(count,)``.

    Raises:
      UserError: the data are missing or damaged, or not as many.
    """
    train = splits_of(config).train
    if count > len(train):
        raise UserError(f"--images={count} is more than the {len(train)} training images")
    known = images_of(config, train, read_pretrained(config))
    silence_false_alarms(make_mesh(1))
    batch = Pipeline(train, batch_size=count, seed=config.seed).batch(0)
    images = normalize(
        jnp.asarray(batch["image"]),
        mean=known.mean,
        std=known.std,
        dtype=resolve_precision(config.precision).dtype,
    )
    return known, images, jnp.asarray(batch["label"])
