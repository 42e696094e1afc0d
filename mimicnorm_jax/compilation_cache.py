"""Entries of the cache of compiled programs that a kill or a full disk cut short are replaced."""

from __future__ import annotations

import glob
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
        elif count := delete_cut_entries(pathlib.Path(folder), _program(str(message))):
            print(f"NOTE: entries of {folder} that were cut are replaced: {count}", file=sys.stderr)

    mend.deletes_cut_entries = True  # type: ignore[attr-defined]
    warnings.showwarning = mend


def _program(message: str) -> str:
    """The name of the program that JAX could not read, with which its entries begin."""
    return message.partition("'")[2].partition("'")[0]


def delete_cut_entries(folder: pathlib.Path, program: str = "") -> int:
    """Deletes the entries of a cache that were cut short.

    Args:
      folder: of the cache.
      program: with whose name they begin.

    Returns:
      How many that were.
    """
    # JAX chooses how they are packed by what is installed
    from jax._src.compilation_cache import compress_executable, decompress_executable

    packed_here = compress_executable(b"")[:2]
    count = 0
    for path in folder.glob(f"{glob.escape(program)}*-cache"):
        try:
            content = path.read_bytes()
            if content and content[:2] != packed_here:  # by another environment, which can read it
                continue
            decompress_executable(content)
        except OSError:  # another process has deleted it
            continue
        except Exception:  # each way of packing has its own
            path.unlink(missing_ok=True)
            count += 1
    return count
