"""The peak of a device's allocator over some real training steps."""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import jax
import numpy as np
from jax.sharding import Mesh

from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.tools.memory.compiled import images_without_data, program_of
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.variants import Variant
from mimicnorm_jax.train.program import Program
from mimicnorm_jax.train.setup import configure_jax

_STEPS = 3


def random_batch(program: Program, num_classes: int | None = None) -> dict[str, jax.Array]:
    """Random images and labels on the devices of a program."""
    images = images_without_data(program.config, num_classes)
    generator = np.random.default_rng(0)
    size = program.config.batch_size
    batch = {
        "image": generator.integers(0, 256, (size, *images.shape), np.uint8),
        "label": generator.integers(0, images.num_classes, size).astype(np.int32),
    }
    return shard_batch(batch, program.mesh)


def allocator_peak(variant: Variant, mesh: Mesh, num_classes: int | None = None) -> int | None:
    """Trains a few steps on random images, in a process of its own: a peak is never forgotten.

    Args:
      variant: the configuration.
      mesh: the devices.
      num_classes: where the configuration does not tell.

    Returns:
      The greatest number of bytes of a device in use; None where that is not known: CPUs do not
      count it, and a TPU belongs to one process.

    Raises:
      UserError: the step does not run, as where memory does not suffice.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return None
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(_peak, variant, mesh.size, num_classes).result()
        except Exception as error:
            raise UserError(f"{variant.label} does not run: {first_line(error)}") from error


def _peak(variant: Variant, num_devices: int, num_classes: int | None) -> int:
    configure_jax(variant.config)
    program = program_of(variant, mesh_of("gpu", num_devices), num_classes)
    state, batch = program.initial_state(), random_batch(program, num_classes)
    for _ in range(_STEPS):
        state, metrics = program.train_step(state, batch)
    jax.block_until_ready(metrics)
    stats = [device.memory_stats() or {} for device in program.mesh.devices.flat]
    return max(of_device["peak_bytes_in_use"] for of_device in stats)
