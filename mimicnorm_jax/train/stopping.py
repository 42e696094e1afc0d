"""Stopping well: a signal stops the run at one moment, the same in all of its processes."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from mimicnorm_jax.parallel.coordination import process_count


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop; the message says by what."""


class StopRequest:
    """Listens for SIGTERM, SIGINT, SIGHUP and preemption of any process while in a ``with`` block.

    SIGHUP comes when a terminal is closed; where it is ignored, as under ``nohup``, it stays so.

    In another thread than the main one it hears no signals.

    A second signal acts as it would have without this.

    In a run of several processes, JAX's preemption service hears SIGTERM, tells the other
    processes, and agrees with them on the call of ``raise_if_asked`` that stops them all. So
    each process must call it equally often between the same steps.
    """

    def __init__(self) -> None:
        self._alone = process_count() == 1
        self._before: dict[int, Any] = {}
        self._received: str | None = None
        self._calls = 0

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
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if self._alone:
            self._received = signal.Signals(number).name
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def raise_if_asked(self) -> None:
        """Raises ``Stopped`` if the run is to stop here."""
        self._calls += 1
        if self._received is not None:
            raise Stopped(self._received)
        if not self._alone and multihost_utils.reached_preemption_sync_point(self._calls):
            raise Stopped("SIGTERM or preemption")
