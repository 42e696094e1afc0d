"""Runs as guests of a process that is not theirs, such as a notebook's: they leave it as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

# What a run sets for the whole process.
JAX_OPTIONS = (
    "jax_enable_x64",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_logging_level",
)

_lock = threading.Lock()
_guests = 0
_before: dict[str, Any] = {}


def guests() -> int:
    """How many runs are guests of this process now."""
    return _guests


@contextlib.contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Takes back what runs in the ``with`` block set, when the last of them has left.

    What JAX reads once, when it starts, stays: ``config.cpu_threads`` and ``config.deterministic``
    in the environment. Several threads may be in such a block at once.
    """
    global _guests
    import jax
    from absl import logging

    with _lock:
        if not _guests:
            _before.update({name: getattr(jax.config, name) for name in JAX_OPTIONS})
            _before["verbosity"] = logging.get_verbosity()
            logging.set_verbosity(logging.FATAL)  # Orbax tells of every file it writes
        _guests += 1
    try:
        yield
    finally:
        with _lock:
            _guests -= 1
            if not _guests:
                logging.set_verbosity(_before.pop("verbosity"))
                for name, value in _before.items():
                    if getattr(jax.config, name) != value:
                        jax.config.update(name, value)
