"""What a run was made with: versions, code, configuration, machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import FREE_FIELDS, flatten
from mimicnorm_jax.parallel.backend import pool_threads
from mimicnorm_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def config_as_json(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by dotted name, as a file can hold them."""
    return json.loads(json.dumps(flatten(config)))


def config_digest(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields that decide what a run computes.

    Runs with the same digest, on the same data, machine and versions, are the same bit for bit.

    Args:
      fields: from ``config_as_json``.
    """
    decisive = {name: value for name, value in fields.items() if name not in FREE_FIELDS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def hardware(mesh: Mesh) -> dict[str, Any]:
    """What else decides the bits of a result: the devices, the compiler, and on CPUs the machine.

    XLA adds in another order for another set of instructions, and splits products by the number of
    threads.
    """
    device = mesh.devices.flat[0]
    of_machine = {
        "processor": _processor(),
        "instructions": _instructions(),
        "threads": pool_threads(),
    }
    return {
        "device_kind": device.device_kind,
        "num_devices": mesh.size,
        "num_processes": jax.process_count(),
        "jax_version": jax.__version__,
        "jaxlib_version": _version("jaxlib"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **(of_machine if device.platform == "cpu" else {}),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, in what two results of ``hardware`` differ, as far as both tell of it."""
    return [
        f"{name.replace('_', ' ')} {_short(before[name])}, now {_short(now[name])}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def _short(value: Any) -> str:
    return str(value)[:60] if value else "none"


@functools.cache
def _cpu_info() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _processor() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    """The widest vector instructions."""
    there = (_cpu_info().get("flags") or _cpu_info().get("Features") or "").split()
    known = ("amx_tile", "avx512f", "avx2", "avx", "sve2", "sve", "asimd")
    return next((name for name in known if name in there), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it computes with."""
    return {
        "python": platform.python_version(),
        "mimicnorm-jax": __version__,
        **{package: _version(package) for package in _PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    folder = pathlib.Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code() -> dict[str, Any]:
    """The commit that this package is at, and whether its files were changed since.

    Null where it was not installed from a checkout (``pip install -e``).
    """
    # a checkout that holds this file, not one in which an environment happens to lie
    if not _git("ls-files", "--", "__init__.py"):
        return {"git_commit": None, "git_dirty": None}
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", "..")),
    }
