"""Whether a device computes what a CPU does: one training step in float32 on both."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.parallel import DATA_AXIS, replicate, shard_batch
from mimicnorm_jax.train.program import Images, make_program
from mimicnorm_jax.train.state import TrainState, host_copy

# Sums of float32 in another order stay well below this, the shorter formats of matrix units,
# which may not be used here, do not.
TOLERANCE = 1e-3


def _mesh(platform: str | None) -> Mesh:
    devices = np.array(jax.devices(platform)[:1])
    return Mesh(devices, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def differences(config: ConfigDict, images: Images) -> dict[str, float]:
    """Takes the same step of random images on the default device and on a CPU.

    Args:
      config: what is trained; precision and augmentation are replaced.
      images: what they are like.

    Returns:
      ``loss``, ``gradient_norm`` and ``update`` (what the step adds to the parameters): the
      norm of the difference over that of the CPU's.
    """
    config = copy.deepcopy(config)
    config.precision = "float32"
    config.schedule.warmup_epochs = 0.0  # whose first rate is 0
    config.data.update(pad_crop=0, flip=False, rotation=0.0)
    generator = np.random.default_rng(0)
    size = config.batch_size
    batch = {
        "image": generator.integers(0, 256, (size, *images.shape), np.uint8),
        "label": generator.integers(0, images.num_classes, size).astype(np.int32),
    }
    with jax.default_matmul_precision("highest"):
        reference = make_program(config, images, _mesh("cpu"))
        start = host_copy(reference.initial_state())
        results = []
        for mesh in (_mesh(None), reference.mesh):
            program = make_program(config, images, mesh)
            state, metrics = program.train_step(replicate(start, mesh), shard_batch(batch, mesh))
            results.append(_compared(start, host_copy(state), jax.device_get(metrics)))
    ours, expected = results
    return {name: _distance(ours[name], expected[name]) for name in expected}


def _compared(start: TrainState, end: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
    update = jax.tree.map(lambda after, before: after - before, end.params, start.params)
    return {
        "loss": metrics["loss"],
        "gradient_norm": metrics["gradient_norm"],
        "update": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)]),
    }


def _distance(value: np.ndarray, expected: np.ndarray) -> float:
    difference = np.asarray(value, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))
