"""What a program is compiled for: devices that are here, or TPUs that are not."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel import DATA_AXIS

LOCK = "/tmp/libtpu_lockfile"


def mesh_of(target: str, num_devices: int | None) -> Mesh:
    """The devices of a target, as one axis.

    Args:
      target: ``"cpu"``, ``"gpu"`` or ``"tpu"`` (what is here), or ``"tpu:TOPOLOGY"`` such as
        ``"tpu:v5e:2x2"``, which needs no TPU but the extra ``tpu``.
      num_devices: how many of them; None for all.

    Raises:
      UserError: they are not there, or cannot be described.
    """
    kind, _, topology = target.partition(":")
    if kind not in ("cpu", "gpu", "tpu") or (topology and kind != "tpu"):
        raise UserError(
            f"--target={target} is unknown; allowed: cpu, gpu, tpu, or a topology that need not "
            "be here, such as tpu:v5e:2x2 or tpu:v4:2x2x1"
        )
    devices = _described(topology) if topology else _present(kind)
    if num_devices is not None and num_devices > len(devices):
        raise UserError(f"config.num_devices = {num_devices}, but {target} has only {len(devices)}")
    return Mesh(np.array(devices[:num_devices]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _present(kind: str) -> list[Any]:
    try:
        return jax.devices(kind)
    except RuntimeError as error:
        hint = "; a topology need not be here: --target=tpu:v5e:2x2" if kind == "tpu" else ""
        raise UserError(f"--target={kind}: there is none here{hint}") from error


def _described(topology: str) -> list[Any]:
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
