"""Entries of the cache of compiled programs that a kill or a full disk cut short are replaced."""

from __future__ import annotations

import pathlib
import sys
import warnings
from typing import Any

import jax

_UNREADABLE = "Error reading persistent compilation cache entry"


def replace_cut_entries() -> None:
    """From now on a cut entry is deleted where JAX warns of it, which then writes it again.

    JAX leaves such a file where it is, and compiles and warns at every start.
    """
    if getattr(warnings.showwarning, "deletes_cut_entries", False):
        return
    show = warnings.showwarning

    def mend(message: Any, *arguments: Any, **options: Any) -> None:
        folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not str(message).startswith(_UNREADABLE) or not folder:
            show(message, *arguments, **options)
        elif count := delete_cut_entries(pathlib.Path(folder)):
            print(f"NOTE: entries of {folder} that were cut are replaced: {count}", file=sys.stderr)

    mend.deletes_cut_entries = True  # type: ignore[attr-defined]
    warnings.showwarning = mend


def delete_cut_entries(folder: pathlib.Path) -> int:
    """Deletes what JAX cannot unpack in a cache; returns how many entries that were."""
    # JAX chooses how they are packed by what is installed
    from jax._src.compilation_cache import decompress_executable

    count = 0
    for path in folder.glob("*-cache"):
        try:
            decompress_executable(path.read_bytes())
        except OSError:  # another process has deleted it
            continue
        except Exception:  # each way of packing has its own
            path.unlink(missing_ok=True)
            count += 1
    return count
