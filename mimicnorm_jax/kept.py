"""The user's cache folder, and in it what took long to find out about files that do not change.

Not beside the data, which may be read-only or of others. Nothing depends on it but time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pathlib
import time
import zlib
from collections.abc import Iterable
from typing import Any

_VERSION = 1  # of what is kept
_WORTH_KEEPING = 0.5  # seconds that it took
_FRESH = 2.0  # seconds in which a file may change once more and keep its time


def cache_folder() -> pathlib.Path:
    """Where what can be found out again is kept, compiled programs too."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "mimicnorm_jax"


def recall(what: str) -> Any:
    """What is kept, or None: there is nothing, or a file that it depends on has changed.

    Args:
      what: tells it from all else, such as ``"the files of /data/train"``.
    """
    try:
        with gzip.open(_path(what), "rt") as file:
            found = json.load(file)
        if found["what"] == what and all(_state(p) == state for p, state in found["on"].items()):
            return found["value"]
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, zlib.error):
        pass  # not there, of no use any more, or damaged; or nobody knows a home
    return None


def keep(what: str, value: Any, *, began: float, depends_on: Iterable[str | pathlib.Path]) -> None:
    """Keeps a value, where that saves time, and the files had their state before it was looked for.

    Args:
      what: as in ``recall``.
      value: what JSON can hold.
      began: ``time.time()`` when it was not known yet.
      depends_on: files and folders; where one has another time or size, it is not recalled.
    """
    if time.time() - began < _WORTH_KEEPING:
        return
    try:
        states = {str(path): _state(path) for path in depends_on}
        if any(times[0] > (began - _FRESH) * 1e9 for times in states.values()):
            return
        path = _path(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with gzip.open(draft, "wt", compresslevel=1) as file:
            json.dump({"what": what, "on": states, "value": value}, file)
        draft.replace(path)
    except (OSError, RuntimeError):  # a machine without a home, or a full one
        pass


def _path(what: str) -> pathlib.Path:
    digest = hashlib.sha256(f"{_VERSION} {what}".encode(errors="surrogateescape")).hexdigest()
    return cache_folder() / "data" / f"{digest[:40]}.json.gz"


def _state(path: str | pathlib.Path) -> list[int]:
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]
