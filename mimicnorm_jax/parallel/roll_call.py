"""A roll call: every process of a run reports to process 0 before JAX connects them.

JAX's own start-up cannot say which process is missing, and ends a process that waited in vain
with an abort from C++. Here every process knows for whom it waits. The call is held on the port
of the coordinator, which JAX's service takes over when all are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mimicnorm_jax.errors import RunError, UserError, refused_by_system

_SECONDS_BETWEEN_NEWS = 10.0
_POLL = 0.2
_LONGEST_LINE = 65_536  # bytes; a process says what it was started with
_MOST_STRANGERS = 64  # connections that have not said who they are

Say = Callable[[str], None]


def is_own(host: str) -> bool:
    """Whether to listen on an address of this machine only; else on all of them.

    Not where something else leads from there to this machine, nor where this machine takes the name
    for a loopback address, as many do with their own: others take it for another one.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        leads_back = ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback
        socket.create_server(place[:2], family=family).close()
    except (OSError, ValueError):
        return False
    is_meant = host in ("localhost", "::1") or host.startswith("127.")
    return is_meant or not leads_back


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
        self.say = say
        self._since = time.strftime("%H:%M:%S")
        self._began = self._said = time.monotonic()
        self.deadline = self._began + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def tell(self, whom: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_NEWS:
            self._said = now
            self.say(
                f"{self._who} waits for {whom} since {self._since} ({now - self._began:.0f} s)"
            )


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """What processes that belong together agree in, by name, in few bytes."""
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
        for name, value in values.items()
    }


def roll_call(
    address: str,
    process: int,
    count: int,
    *,
    seconds: float,
    say: Say,
    alike: Mapping[str, str] | None = None,
) -> None:
    """Returns when all processes are there, in each of them.

    Whoever reaches the port may speak: what is no report of a process of this run is not heard.

    Args:
      address: ``HOST:PORT`` of process 0.
      process: the index of this process.
      count: the number of processes.
      seconds: how long to wait.
      say: prints a line.
      alike: what must be the same in all of them, from ``digests``.

    Raises:
      RunError: not all came in time, or process 0 ended.
      UserError: the port cannot be used; two processes have the same index, were told
        another number of processes, or differ in what must be the same.
    """
    host, port = split_address(address)
    waiting = _Waiting(f"process {process}/{count}", seconds, say)
    if process == 0:
        _hold(host, port, {"count": count, "alike": dict(alike or {})}, waiting, seconds)
    else:
        report = {"process": process, "count": count, "alike": dict(alike or {})}
        _report(host, port, report, waiting, seconds)


def _server(host: str, port: int) -> socket.socket:
    if is_own(host):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it ended: seen where its messages are received
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hold(
    host: str, port: int, expected: dict[str, Any], waiting: _Waiting, seconds: float
) -> None:
    count = expected["count"]
    with refused_by_system(f"--coordinator={host}:{port} cannot be used"):
        server = _server(host, port)
    with _Callers(server, expected, waiting.say) as callers:
        while missing := set(range(1, count)) - set(callers.present.values()):
            if waiting.is_over():
                error = (
                    f"{in_words(missing)} of {count} did not come within {seconds:.0f} s"
                    + callers.refused
                )
                callers.tell({"error": error})
                raise RunError(f"{error}; were all of them started, with the same --coordinator?")
            waiting.tell(in_words(missing))
            callers.tell({"missing": sorted(missing)})
            callers.listen()
        callers.tell({"missing": []})


class _Callers:
    """Who has come to the port of process 0: processes of the run, and whoever else.

    Args:
      server: where they come; it is closed at the end of the ``with`` block, with all of them.
      expected: ``count`` and ``alike`` of a process of the run.
      say: prints a line.

    Attributes:
      present: the processes of the run, by connection.
      refused: in words, why the last one was refused.
    """

    def __init__(self, server: socket.socket, expected: dict[str, Any], say: Say):
        self.present: dict[socket.socket, int] = {}
        self.refused = ""
        self._said: dict[socket.socket, bytes] = {}  # by those who have not said who they are
        self._server = server
        self._expected = expected
        self._say = say
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> _Callers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self.present, *self._said, self._server]:
            connection.close()
        self._selector.close()

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to the processes of the run."""
        for connection in self.present:
            _send(connection, message)

    def listen(self) -> None:
        """Hears what comes within a moment."""
        for key, _ in self._selector.select(_POLL):
            if key.fileobj is self._server:
                self._accept()
                continue
            known = [c for c in (*self._said, *self.present) if c is key.fileobj]
            for connection in known:  # unless it was dismissed for another a moment ago
                if not self._is_welcome(connection):
                    self._dismiss(connection)

    def _dismiss(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self.present.pop(connection, None)
        self._said.pop(connection, None)
        connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # it has gone, or this process may open no more files
            return
        if len(self._said) >= _MOST_STRANGERS:  # a process of the run says at once who it is
            self._dismiss(next(iter(self._said)))
        connection.settimeout(5.0)
        self._said[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _is_welcome(self, connection: socket.socket) -> bool:
        """Takes what has come; False where it ended, or is none of ours."""
        said = self._said.pop(connection, b"")
        try:
            more = connection.recv(_LONGEST_LINE)
        except OSError:
            return False
        if not more or len(said) + len(more) > _LONGEST_LINE or connection in self.present:
            return False
        if not more.endswith(b"\n"):  # more of it will come
            self._said[connection] = said + more
            return True
        number = self._number(connection, said + more)
        if number is not None:
            self.present[connection] = number
        return number is not None

    def _number(self, connection: socket.socket, said: bytes) -> int | None:
        """The index that a process of the run reports; None of any other caller."""
        try:
            report = json.loads(said)
            number, its_count, alike = report["process"], report["count"], report["alike"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if type(number) is not int or type(its_count) is not int or type(alike) is not dict:
            return None
        count, own = self._expected["count"], self._expected["alike"]
        if its_count != count:
            reason = f"process {number} was told of {its_count} processes, process 0 of {count}"
        elif number in self.present.values() or not 0 < number < count:
            reason = f"there is a process {number} already"
        elif differing := [name for name, value in own.items() if alike.get(name) != value]:
            reason = f"processes 0 and {number} differ in {', '.join(differing)}"
        else:
            return number
        _send(connection, {"refused": reason})
        self.refused = f" (refused: {reason})"
        self._say(f"process 0/{count} refuses one at its port: {reason}")
        return None


def _report(
    host: str, port: int, report: dict[str, Any], waiting: _Waiting, seconds: float
) -> None:
    with _connected(host, port, waiting, seconds) as connection:
        _send(connection, report)
        for message in _messages(connection):
            if "refused" in message:
                raise UserError(f"process 0 at {host}:{port} refuses: {message['refused']}")
            if "error" in message:
                raise RunError(message["error"])
            if not message.get("missing"):
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
            for line in lines:
                yield {} | json.loads(line)
    except (OSError, ValueError, TypeError, RecursionError):
        return
