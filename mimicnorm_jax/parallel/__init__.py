"""The devices and the processes of a run."""

from mimicnorm_jax.parallel.mesh import (
    DATA_AXIS,
    check_batch_size,
    connect,
    make_mesh,
    quick_compilation,
    replicate,
    replicated,
    shard_batch,
)

__all__ = [
    "DATA_AXIS",
    "check_batch_size",
    "connect",
    "make_mesh",
    "quick_compilation",
    "replicate",
    "replicated",
    "shard_batch",
]
