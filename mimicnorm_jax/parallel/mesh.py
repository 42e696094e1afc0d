"""The devices of a run: one mesh axis over which every batch is spread."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.methods import Method
from mimicnorm_jax.parallel.backend import started

DATA_AXIS = "data"


def quick_compilation(platform: str) -> dict[str, Any]:
    """Options of ``jax.jit`` for a function that runs once.

    Optimizing the random number generation of every kernel's shape takes XLA's CPU backend
    longer (6 s for a ResNet-20) than running it does.
    """
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else {}


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over ``num_devices`` devices (None: all), as many of each process.

    The devices of a process follow each other, so that its part of a batch is one slice of it.

    Raises:
      UserError: more devices are asked for than there are, or a number that the processes
        cannot share equally.
    """
    devices = sorted(started(jax.devices), key=lambda device: (device.process_index, device.id))
    processes = jax.process_count()
    if num_devices is None:
        num_devices = len(devices)
    if num_devices > len(devices):
        raise UserError(
            f"config.num_devices = {num_devices}, but the number of devices is {len(devices)}"
        )
    if num_devices % processes:
        raise UserError(
            f"config.num_devices = {num_devices} does not divide by the {processes} processes"
        )
    by_process = np.array(devices).reshape(processes, -1)
    chosen = by_process[:, : num_devices // processes].ravel()
    # Auto axes: with the newer default, Explicit, every operation would have to say how
    # its result is spread.
    return Mesh(chosen, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def connect(mesh: Mesh) -> None:
    """Connects the processes of a mesh, which all call this at about the same time.

    The first collective does so, and Gloo, which it goes by on CPUs, gives it 30 s, within which
    processes do not come that list images or compile at different speeds. Later ones wait.
    """
    if jax.process_count() > 1:
        ones = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, P(DATA_AXIS)), lambda _: np.ones(1, np.float32)
        )
        jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(ones).block_until_ready()


def check_batch_size(batch_size: int, mesh: Mesh, method: Method, micro_batches: int = 1) -> None:
    """Raises ``UserError`` unless the batch fits devices, method and micro-batches."""
    if batch_size % mesh.size:
        raise UserError(
            f"config.batch_size = {batch_size} does not divide by the {mesh.size} devices"
        )
    if batch_size % (mesh.size * micro_batches):
        raise UserError(
            f"config.batch_size = {batch_size} does not divide by {mesh.size} device(s) times "
            f"config.micro_batches = {micro_batches}"
        )
    if batch_size < method.min_batch_size(mesh.size):
        raise UserError(
            f"config.batch_size = {batch_size} is too small for {method.name} on {mesh.size} "
            f"device(s): its batch statistics need at least {method.min_batch_size(mesh.size)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: parameters, statistics, metrics."""
    return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays, the same in every process, on all devices.

    Args:
      tree: of NumPy arrays; they may be overwritten afterwards.
      mesh: the devices.
    """
    sharding = replicated(mesh)

    def put(value: np.ndarray) -> jax.Array:
        # not device_put, which would compare the values of all processes over the network
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    # On CPU an array may share the memory of the host's, which a donated one must not.
    copy = jax.jit(lambda arrays: jax.tree.map(jax.numpy.copy, arrays), out_shardings=sharding)
    return copy(jax.tree.map(put, tree))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Spreads host arrays ``(B, ...)`` over the devices along their first axis.

    Args:
      batch: tree of arrays: in a run of several processes, this process's part.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, P(DATA_AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
