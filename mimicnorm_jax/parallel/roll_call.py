"""A roll call: every process of a run reports to process 0 before JAX connects them.

JAX's own start-up cannot say which process is missing, and ends a process that waited in vain
with an abort from C++. Here every process knows for whom it waits. The call is held on the port
of the coordinator, which JAX's service takes over when all are there.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mimicnorm_jax.errors import RunError, UserError, refused_by_system

_SECONDS_BETWEEN_NEWS = 10.0
_POLL = 0.2
_LONGEST_LINE = 4096

Say = Callable[[str], None]


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
      UserError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address} is not HOST:PORT, such as 10.0.0.2:8476")
    return host, int(port)


def in_words(processes: Iterable[int]) -> str:
    """``process 3`` or ``processes 1, 2 and 5``; of many only the first."""
    numbers = [str(number) for number in sorted(processes)]
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    if len(numbers) > 8:
        return f"processes {', '.join(numbers[:8])} and {len(numbers) - 8} others"
    return f"processes {', '.join(numbers[:-1])} and {numbers[-1]}"


class _Waiting:
    """How long a process has been waiting; says so now and then."""

    def __init__(self, who: str, seconds: float, say: Say):
        self._who = who
        self._say = say
        self._since = time.strftime("%H:%M:%S")
        self._began = self._said = time.monotonic()
        self.deadline = self._began + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def tell(self, whom: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_NEWS:
            self._said = now
            self._say(
                f"{self._who} waits for {whom} since {self._since} ({now - self._began:.0f} s)"
            )


def roll_call(address: str, process: int, count: int, *, seconds: float, say: Say) -> None:
    """Returns when all processes are there, in each of them.

    Args:
      address: ``HOST:PORT`` of process 0.
      process: the index of this process.
      count: the number of processes.
      seconds: how long to wait.
      say: prints a line.

    Raises:
      RunError: not all came in time, or process 0 ended.
      UserError: the port cannot be used; two processes have the same index, or were told
        another number of processes.
    """
    host, port = split_address(address)
    waiting = _Waiting(f"process {process}/{count}", seconds, say)
    if process == 0:
        _hold(host, port, count, waiting, seconds)
    else:
        _report(host, port, process, count, waiting, seconds)


def _server(host: str, port: int) -> socket.socket:
    if is_loopback(host):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it ended: seen where its messages are received
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hold(host: str, port: int, count: int, waiting: _Waiting, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        with refused_by_system(f"--coordinator={host}:{port} cannot be used"):
            server = stack.enter_context(_server(host, port))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        present: dict[socket.socket, int] = {}
        missing = set(range(1, count))
        while missing:
            for key, _ in selector.select(_POLL):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    connection.settimeout(5.0)
                    selector.register(stack.enter_context(connection), selectors.EVENT_READ)
                    continue
                connection = key.fileobj  # type: ignore[assignment]
                number = _received(connection, set(present.values()), count)
                if number is None:  # it ended, or is none of ours
                    selector.unregister(connection)
                    present.pop(connection, None)
                    connection.close()
                else:
                    present[connection] = number
            missing = set(range(1, count)) - set(present.values())
            if missing and waiting.is_over():
                error = f"{in_words(missing)} of {count} did not come within {seconds:.0f} s"
                for connection in present:
                    _send(connection, {"error": error})
                raise RunError(f"{error}; were all of them started, with the same --coordinator?")
            if missing:
                waiting.tell(in_words(missing))
            for connection in present:
                _send(connection, {"missing": sorted(missing)})


def _received(connection: socket.socket, present: set[int], count: int) -> int | None:
    """The index that a process reports; None if its connection is to be closed."""
    try:
        data = connection.recv(_LONGEST_LINE)
        report = json.loads(data)
        number, its_count = int(report["process"]), int(report["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if its_count != count:
        reason = f"process {number} was told of {its_count} processes, process 0 of {count}"
    elif number in present or not 0 < number < count:
        reason = f"there is a process {number} already"
    else:
        return number
    _send(connection, {"refused": reason})
    return None


def _report(
    host: str, port: int, process: int, count: int, waiting: _Waiting, seconds: float
) -> None:
    with _connected(host, port, waiting, seconds) as connection:
        _send(connection, {"process": process, "count": count})
        for message in _messages(connection):
            if "refused" in message:
                raise UserError(f"process 0 at {host}:{port} refuses: {message['refused']}")
            if "error" in message:
                raise RunError(message["error"])
            if not message["missing"]:
                return
            waiting.tell(in_words(message["missing"]))
    raise RunError(f"process 0 at {host}:{port} ended while the others were awaited")


def _connected(host: str, port: int, waiting: _Waiting, seconds: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5.0)
            # Process 0 speaks five times a second; it gives up by itself.
            connection.settimeout(seconds + 60.0)
            return connection
        except OSError as error:
            if waiting.is_over():
                reason = error.strerror or error
                raise RunError(
                    f"process 0 did not come to {host}:{port} within {seconds:.0f} s ({reason}); "
                    "was it started, and can this machine reach it?"
                ) from error
        waiting.tell(f"process 0 at {host}:{port}")
        time.sleep(_POLL)


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    try:
        with connection.makefile("rb") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError):
        return
