"""The backend of JAX: started, or one line on why not, and on what it leaves unused."""

from __future__ import annotations

import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
from jax._src import xla_bridge

from mimicnorm_jax.errors import UserError, first_line, one_line

T = TypeVar("T")

# What an accelerator's driver makes, what it is, and what brings JAX's backend for it.
_DRIVERS = (
    ("dev/nvidia0", "an NVIDIA GPU", "cuda12"),
    ("dev/dxg", "a GPU of Windows", "cuda12"),  # in WSL
    ("dev/kfd", "an AMD GPU", "rocm"),
    ("dev/accel0", "a TPU", "tpu"),
    ("dev/vfio/0", "a TPU", "tpu"),
)


def started(look: Callable[[], T]) -> T:
    """What ``look``, the first to need the backend, returns.

    Raises:
      UserError: the backend does not start, such as ``JAX_PLATFORMS=cuda`` without its plugin.
    """
    try:
        return look()
    except (RuntimeError, AssertionError) as error:
        is_ours = isinstance(error, AssertionError) or "nitialize backend" in str(error)
        if not is_ours:  # such as another process that is lost meanwhile
            raise
        asked = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")  # type: ignore[attr-defined]
        if isinstance(error, AssertionError):  # JAX knows the platform, and finds no plugin for it
            reason = "it is not installed here"
        else:
            reason = first_line(error).partition(" (set JAX_PLATFORMS")[0]
        means = f" {asked} (JAX_PLATFORMS)" if asked else ""
        raise UserError(
            f"JAX cannot start its backend{means}: {reason}; JAX_PLATFORMS=cpu trains on the CPU"
        ) from error


def pool_threads() -> int:
    """Threads of XLA's pool on CPUs, which it starts once in a process."""
    asked = os.environ.get("NPROC", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS and Windows have not
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def size_pool(threads: int | None) -> None:
    """Gives XLA's pool on CPUs a number of threads, whatever the number of processors.

    XLA divides long sums among them, so the bits of some networks follow their number.

    Args:
      threads: how many; None leaves it as it is.

    Raises:
      UserError: JAX computes already, with another number.
    """
    if threads is None or threads == pool_threads():
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["NPROC"] = str(threads)
    elif jax.default_backend() == "cpu":
        raise UserError(
            f"config.cpu_threads = {threads} is too late: JAX computes already, with "
            f"{pool_threads()}; set it in the first run of a process, or start with NPROC={threads}"
        )


def unused_accelerator(platform: str, root: pathlib.Path = pathlib.Path("/")) -> str | None:
    """In words, what this machine has and JAX does not use; None where there is nothing to say.

    Args:
      platform: that JAX uses.
      root: of the file system.
    """
    if platform != "cpu" or os.environ.get("JAX_PLATFORMS"):  # which asks for what it uses
        return None
    for device, name, extra in _DRIVERS:
        if (root / device).exists():
            package = "jax-rocm-plugin" if extra == "rocm" else f'"jax[{extra}]"'
            return f"this machine has {name}, which JAX does not use: pip install {package}"
    return None


class _OneLine(logging.Handler):
    """Prints a record as this project prints its own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname}: {one_line(record.getMessage())}", file=sys.stderr, flush=True)


def print_warnings_of_jax() -> None:
    """Lets JAX's own warnings reach the person, each in one line, whatever is quiet beside it."""
    logger = logging.getLogger("jax")
    if "JAX_LOGGING_LEVEL" in os.environ or any(isinstance(h, _OneLine) for h in logger.handlers):
        return
    logger.addHandler(_OneLine())
    logger.setLevel(logging.WARNING)
    logger.propagate = False
