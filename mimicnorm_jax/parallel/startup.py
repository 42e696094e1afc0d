"""Process start-up: finds the cluster, waits for the others, and says who this process is.

Imported by the programs that may run as several processes; it defines their flags.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags

from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel.backend import started, unused_accelerator
from mimicnorm_jax.parallel.roll_call import digests, is_own, roll_call, split_address

_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Run as one of several processes: where a cluster is found or --coordinator is given "
    "(auto), always, or never.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where no cluster tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num-processes", None, "Number of processes, likewise.", 1, 1_000_000
)
_PROCESS_ID = flags.DEFINE_integer("process-id", None, "Index of this process, likewise.", 0)
_WAIT_SECONDS = flags.DEFINE_float(
    "wait-seconds", 300.0, "How long to wait for the other processes at the start.", 1.0, 1e6
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat-seconds", 60, "A process that is silent for so long is given up.", 5, 1_000_000
)


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of a process among the processes of a run.

    Attributes:
      found_by: what told the rest, for people.
      coordinator: ``HOST:PORT`` of process 0.
      count: number of processes.
      index: of this process.
      local_devices: the devices that it may use, None for all on its machine.
    """

    found_by: str
    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def _cluster_name(environment: Mapping[str, str]) -> str:
    for variable, name in (
        ("SLURM_JOB_ID", "SLURM"),
        ("OMPI_MCA_orte_hnp_uri", "Open MPI"),
        ("KUBERNETES_SERVICE_HOST", "Kubernetes"),
    ):
        if variable in environment:
            return name
    return "Cloud TPU"


def find_cluster(seconds: float) -> Membership | None:
    """The cluster that this process was started in: SLURM, Kubernetes, Cloud TPU, Open MPI.

    Args:
      seconds: how long to wait until process 0 has an address.

    Returns:
      None where there is none; its process may be the only one.

    Raises:
      UserError: a cluster that does not tell all that is needed.
    """
    # JAX knows the clusters, but its public initialize() neither says what it found nor can
    # it wait in a way that a person understands.
    from jax._src.clusters import ClusterEnv

    environment = os.environ
    name = _cluster_name(environment)
    if name == "Kubernetes" and not _has_kubernetes_client(environment):
        return None
    try:
        coordinator, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(seconds)
        )
    except Exception as error:  # what a cluster's own interface raises
        raise UserError(
            f"this looks like {name}, but: {first_line(error)}; give --coordinator, "
            "--num-processes and --process-id, or --distributed=off to run alone"
        ) from error
    if coordinator is None or not count or index is None:
        return None
    if name == "SLURM" and count <= int(environment.get("SLURM_STEP_NUM_NODES", 0)):
        devices = None  # JAX takes one a process, also where a process has a machine for itself
    return Membership(name, coordinator, count, index, tuple(devices) if devices else None)


def _has_kubernetes_client(environment: Mapping[str, str]) -> bool:
    """Whether JAX can ask Kubernetes; a process of an indexed job needs to be told how."""
    if "TPU_WORKER_HOSTNAMES" in environment:  # GKE tells the workers of a TPU slice directly
        return True
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        if "JOB_COMPLETION_INDEX" not in environment:
            return False
        raise UserError(
            "this is a process of a Kubernetes job: give --coordinator, --num-processes and "
            "--process-id, as launch/kubernetes.yaml does, or --distributed=off to run alone"
        ) from None
    return "JOB_COMPLETION_INDEX" in environment


def membership(
    mode: str,
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    find: Callable[[], Membership | None],
) -> Membership | None:
    """Decides whether this process is one of several.

    Args:
      mode: ``"auto"``, ``"on"`` or ``"off"``.
      coordinator, count, index: what the command line says.
      find: finds the cluster.

    Returns:
      None to run alone.

    Raises:
      UserError: flags that do not fit together, or that are missing.
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    said = [flag for flag, value in given.items() if value is not None]
    missing = [flag for flag, value in given.items() if value is None]
    if mode == "off":
        if said:
            raise UserError(f"{said[0]} does not go with --distributed=off")
        return None
    if said and missing:
        raise UserError(f"{' and '.join(missing)} missing beside {' and '.join(said)}")
    if coordinator is not None and count is not None and index is not None:
        split_address(coordinator)
        if not index < count:
            raise UserError(f"--process-id={index} is not below --num-processes={count}")
        return Membership("the command line", coordinator, count, index)
    found = find()
    if found is None and mode == "on":
        raise UserError(
            "--distributed=on, but no cluster is found here (SLURM, "
            "Kubernetes, Cloud TPU, Open MPI); give --coordinator=HOST:PORT, --num-processes and "
            "--process-id"
        )
    return found if found is not None and found.count > 1 else None


def _say(line: str) -> None:
    print(line, flush=True)


def join(alike: Mapping[str, Any] | None = None) -> None:
    """Makes this process one of its run, as the flags say; starts the JAX backend.

    Args:
      alike: what is the same in all processes of a run, by name.

    Raises:
      UserError: wrong flags, or an address that cannot be used.
      RunError: the other processes did not come in time.
    """
    seconds = _WAIT_SECONDS.value
    place = membership(
        _DISTRIBUTED.value,
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        find=lambda: find_cluster(seconds),
    )
    if place is not None:
        _connect(place, seconds, digests(alike or {}))
    local = started(jax.local_devices)
    devices = f"{len(local)} local device" + ("s" if len(local) > 1 else "")
    _say(f"process {jax.process_index()}/{jax.process_count()}, {devices}, {local[0].device_kind}")
    if unused := unused_accelerator(local[0].platform):
        _say(f"NOTE: {unused}")


def _connect(place: Membership, seconds: float, alike: Mapping[str, str]) -> None:
    _say(
        f"process {place.index}/{place.count} of a run described by {place.found_by}, "
        f"with process 0 at {place.coordinator}"
    )
    host, _ = split_address(place.coordinator)
    roll_call(place.coordinator, place.index, place.count, seconds=seconds, say=_say, alike=alike)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        # all are there: what remains is to connect
        initialization_timeout=120,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS.value,
        # otherwise it would listen on all of the machine's addresses
        coordinator_bind_address=place.coordinator if is_own(host) else None,
    )
