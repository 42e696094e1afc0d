"""One run, one folder: the lock on a workdir."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import sys
import time
import uuid
from typing import IO, Any

from mimicnorm_jax.errors import RunError, UserError, refused_by_system
from mimicnorm_jax.parallel import coordination

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = "run.lock"
_SECONDS_UNTIL_SEEN = 30.0  # for so long a network file system may know of no such file


def _is_taken(file: IO[Any], kind: int) -> bool:
    """Takes a lock that the system frees with the process, however that ends."""
    try:
        # Not flock: a worker process would inherit that, and outlive a killed run.
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    return False


def _no_link(path: str, flags: int) -> int:
    """Opens a file of this folder: behind a link there may be one that is to be kept."""
    if os.path.islink(path):
        raise UserError(f"{path} is a link, which may lead to a file of someone else; delete it")
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _holder(path: pathlib.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_unused(workdir: pathlib.Path) -> None:
    """Raises ``UserError`` if another run is writing into ``workdir``; writes nothing."""
    path = workdir / LOCK_NAME
    if fcntl is None or not coordination.is_first() or not path.exists():
        return
    with refused_by_system(f"--workdir={workdir} cannot be used"), path.open() as file:
        try:
            taken = _is_taken(file, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            return
    if taken:
        raise _in_use(workdir)


def _in_use(workdir: pathlib.Path) -> UserError:
    return UserError(
        f"--workdir={workdir} is in use by {_holder(workdir / LOCK_NAME)}; stop it, or choose "
        "another --workdir"
    )


class WorkdirLock:
    """Keeps other runs out of a folder; process 0 holds it for its run.

    Args:
      workdir: the run's folder, which is created.

    Raises:
      UserError: another run is writing into it, or not all processes of this run see it.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._path = workdir / LOCK_NAME
        self._file: IO[str] | None = None
        token = str(uuid.uuid4())
        try:
            coordination.together("lock", lambda: self._take(token))
            coordination.together("shared workdir", self._check_shared(token))
        except UserError:
            self.close()
            raise

    def _take(self, token: str) -> None:
        if not coordination.is_first():
            return
        with refused_by_system(f"--workdir={self._workdir} cannot be written to"):
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+", opener=_no_link)  # noqa: SIM115 (close() closes it)
            try:
                if fcntl is not None and _is_taken(self._file, fcntl.LOCK_EX):
                    raise _in_use(self._workdir)
            except OSError as error:  # a file system without locks
                print(
                    f"WARNING: {self._workdir} cannot be locked ({error.strerror}): make sure that "
                    "no other run uses it",
                    file=sys.stderr,
                )
            self._file.truncate(0)
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "token": token,
            }
            self._file.write(json.dumps(holder) + "\n")
            self._file.flush()

    def _check_shared(self, token: str) -> Any:
        (token, *_) = coordination.exchange("token", token)

        def check() -> None:
            deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
            while not coordination.is_first():
                with contextlib.suppress(OSError):
                    if token in self._path.read_text():
                        return
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--workdir={self._workdir} is not the folder of process 0: it must be "
                        "on a file system that all processes share"
                    )
                time.sleep(0.5)

        return check

    def check(self) -> None:
        """Raises ``RunError`` if the folder has vanished under the run."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            here, held = self._path.stat(), os.fstat(self._file.fileno())
            if (here.st_dev, here.st_ino) == (held.st_dev, held.st_ino):
                return
        raise RunError(
            f"--workdir={self._workdir} has vanished, or was replaced, while the run was writing "
            "into it; what it held is lost from here on"
        )

    def close(self) -> None:
        """Lets other runs in."""
        if self._file is not None:
            self._file.close()
            self._file = None
