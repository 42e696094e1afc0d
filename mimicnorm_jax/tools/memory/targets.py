"""What a program is compiled for: devices that are here, or TPUs and GPUs that are not."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel import DATA_AXIS

LOCK = "/tmp/libtpu_lockfile"

# What XLA's compiler asks of a GPU, as its driver and data sheet say it (XLA's
# GpuTargetConfigProto).
_GPUS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 19 }
        gpu_device_info {
          cuda_compute_capability { major: 9 }
          core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
          threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          shared_memory_per_core: 233472  shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          l2_cache_size: 52428800  device_memory_size: 85520809984
          memory_bandwidth: 3352000000000
        }
    """,
}


def mesh_of(target: str, num_devices: int | None) -> Mesh:
    """The devices of a target, as one axis.

    Args:
      target: ``"cpu"``, ``"gpu"`` or ``"tpu"`` (what is here); ``"tpu:TOPOLOGY"`` such as
        ``"tpu:v5e:2x2"``, which needs no TPU but the extra ``tpu``; or ``"gpu:h100"``, one GPU,
        which needs no GPU but JAX's plugin for CUDA.
      num_devices: how many of them; None for all.

    Raises:
      UserError: they are not there, or cannot be described.
    """
    kind, colon, name = target.partition(":")
    if kind not in ("cpu", "gpu", "tpu") or (colon and (kind == "cpu" or not name)):
        raise UserError(
            f"--target={target} is unknown; allowed: cpu, gpu, tpu, or what need not be here, "
            "such as tpu:v5e:2x2, tpu:v4:2x2x1 or gpu:h100"
        )
    if not name:
        devices = _present(kind)
    else:
        devices = _described_tpus(name) if kind == "tpu" else _described_gpu(name)
    if num_devices is not None and num_devices > len(devices):
        raise UserError(f"config.num_devices = {num_devices}, but {target} has only {len(devices)}")
    return Mesh(np.array(devices[:num_devices]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _present(kind: str) -> list[Any]:
    try:
        return jax.devices(kind)
    except RuntimeError as error:
        hints = {"tpu": "tpu:v5e:2x2", "gpu": "gpu:h100"}
        hint = f"; --target={hints[kind]} need not be here" if kind in hints else ""
        raise UserError(f"--target={kind}: there is none here{hint}") from error


def _described_tpus(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--target=tpu:{topology} needs libtpu: pip install 'mimicnorm-jax[tpu]'")
    # else libtpu asks the cloud which TPU it is on, and waits for an answer
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:
        message = str(error)
        if "lockfile" in message or "already in use" in message:
            raise UserError(
                f"--target=tpu:{topology}: another process holds {LOCK}; wait for its end, or "
                "set ALLOW_MULTIPLE_LIBTPU_LOAD=1 if neither uses a TPU"
            ) from error
        raise UserError(
            f"--target=tpu:{topology} is no topology that libtpu can describe "
            f"({first_line(error)}); some are tpu:v5e:2x2, tpu:v5p:2x2x1, tpu:v6e:2x2"
        ) from error


def _described_gpu(name: str) -> list[Any]:
    if name not in _GPUS:
        raise UserError(f"--target=gpu:{name} is unknown; allowed: {', '.join(_GPUS)}")
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        version = jaxlib.version.__version__
        raise UserError(
            f"--target=gpu:{name} needs JAX's plugin for CUDA: pip install --no-deps "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )
    # else JAX asks for CUDA's libraries, which running needs and compiling does not
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return list(
            topologies.get_topology_desc(
                platform="cuda", target_config=_GPUS[name], topology="1x1x1"
            ).devices
        )
    except Exception as error:
        raise UserError(f"--target=gpu:{name}: {first_line(error)}") from error
