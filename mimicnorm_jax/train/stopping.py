"""Stopping well: a signal stops the run at one moment, the same in all of its processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from mimicnorm_jax.parallel.coordination import (
    all_leave,
    is_told_to_stop,
    leaves,
    process_count,
)

_PATIENCE = 2.0  # seconds in which the main thread may come back from a library
_PERIOD = 0.3  # seconds between two looks at what other processes say


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop; the message says by what."""


_OF_SEVERAL = "SIGTERM or preemption"  # of whichever process


def _tell_all() -> None:
    """Tells JAX's preemption service, which hears SIGTERM, and with it the other processes."""
    os.kill(os.getpid(), signal.SIGTERM)


#: Ends the process at once, after a word; it is given the name of the signal.
Leave = Callable[[str], None]


class _Ear:
    """A thread that hears of signals also while the main thread is in a library.

    Args:
      numbers: the signals.
      heard: called some time after one of them, unless this was closed.
      patience: how long after it, in seconds.
    """

    def __init__(self, numbers: Collection[int], heard: Leave, patience: float):
        self._numbers = set(numbers)
        self._heard = heard
        self._patience = patience
        self._closed = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The handler in C writes the number of each signal there, whatever Python is doing.
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in self._numbers and not self._closed.wait(self._patience):
                self._heard(signal.Signals(number[0]).name)
                return

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._closed.set()
        os.close(self._write)  # which ends the thread
        self._thread.join()
        os.close(self._read)


class _Lookout:
    """A thread that sees that a process of the run is told to stop, whatever the main thread does.

    Args:
      leave: called some time after that, in all processes, or in none: if one has closed this.
    """

    def __init__(self, leave: Leave):
        self._leave = leave
        self._closed = threading.Event()
        self._answer = threading.Lock()
        self._leaves = False
        self._thread = threading.Thread(target=self._look, name="stops", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._closed.wait(_PERIOD):
            if is_told_to_stop():
                self._closed.wait(_PATIENCE)
                break
        with self._answer:
            self._leaves = not self._closed.is_set()
            leaves(self._leaves)
        deadline = time.monotonic() + 5 * _PATIENCE  # a process may be lost meanwhile
        while self._leaves and time.monotonic() < deadline:
            if (all_do := all_leave()) is not None:
                if all_do:
                    self._leave(_OF_SEVERAL)
                return
            time.sleep(_PERIOD)

    def close(self) -> None:
        with self._answer:
            self._closed.set()
        self._thread.join()  # who has said that it leaves waits for the others' answers


class StopRequest:
    """Listens for SIGTERM, SIGINT, SIGHUP and preemption of any process while in a ``with`` block.

    SIGHUP comes when a terminal is closed; where it is ignored, as under ``nohup``, it stays so.

    In another thread than the main one it hears no signals.

    A second signal acts as it would have without this.

    While the main thread is in a library for long, as when a step compiles, Python does not hear
    signals. Until ``something_to_lose`` was called, the process then ends without it: what it would
    save is what it began with.

    In a run of several processes, JAX's preemption service hears SIGTERM, tells the other
    processes, and agrees with them on the call of ``raise_if_asked`` that stops them all. So
    each process must call it equally often between the same steps. Before the first step they end
    without that agreement.

    Args:
      leave: ends the process before it has something to lose; None: it waits for the main thread.
    """

    def __init__(self, leave: Leave | None = None) -> None:
        self._alone = process_count() == 1
        self._before: dict[int, Any] = {}
        self._received: str | None = None
        self._calls = 0
        self._leave = leave
        self._threads: list[_Ear | _Lookout] = []

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # only there Python lets signals be handled
        # SIGTERM's handler in a run of several processes is JAX's, in C++
        heard = [signal.SIGINT, *([signal.SIGTERM] if self._alone else [])]
        hangup = getattr(signal, "SIGHUP", None)  # which Windows has not
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            heard.append(hangup)
        for number in heard:
            self._before[number] = signal.signal(number, self._handle)
        if self._leave is not None and os.name == "posix":
            if self._alone:
                self._threads = [_Ear(heard, self._leave, _PATIENCE)]
            else:
                self._threads = [_Ear(heard, lambda _: _tell_all(), 0.0), _Lookout(self._leave)]
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.something_to_lose()

    def something_to_lose(self) -> None:
        """Tells that a step was taken: from now on the main thread has something to save."""
        while self._threads:
            self._threads.pop().close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if self._alone:
            self._received = signal.Signals(number).name
        else:
            _tell_all()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def raise_if_asked(self) -> None:
        """Raises ``Stopped`` if the run is to stop here."""
        self._calls += 1
        if self._received is not None:
            self.something_to_lose()  # the main thread sees to it
        if self._received is not None:
            raise Stopped(self._received)
        if not self._alone and multihost_utils.reached_preemption_sync_point(self._calls):
            raise Stopped(_OF_SEVERAL)
