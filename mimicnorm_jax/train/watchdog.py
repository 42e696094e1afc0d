"""Ends a run that hangs, also while it is set up, or one of whose other processes has failed."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.parallel.coordination import Failure
from mimicnorm_jax.progress_bar import listeners

_PERIOD = 0.5  # seconds between two looks
_GRACE = 2.0  # seconds in which the main thread finds out by itself why it has to end


class Watchdog:
    """A thread that looks after the main one while in a ``with`` block.

    Args:
      hang_minutes: without a beat, or an item of a progress bar, for so long, it prints the stacks
        of all threads and ends the process with exit code 1; None never does.
    """

    def __init__(self, hang_minutes: float | None):
        self._hang_minutes = hang_minutes
        self._beaten = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        listeners.append(self.beat)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        listeners.remove(self.beat)
        self._done.set()
        self._thread.join()

    def beat(self) -> None:
        """Tells that the run goes on."""
        self._beaten.set()

    def _watch(self) -> None:
        silent = 0.0
        # Time is counted in own periods, not by a clock: a process that was stopped (Ctrl-Z,
        # a laptop's lid) did not hang.
        while not self._done.wait(_PERIOD):
            silent = 0.0 if self._beaten.is_set() else silent + _PERIOD
            self._beaten.clear()
            if self._hang_minutes is not None and silent > 60 * self._hang_minutes:
                self._end_hanging()
            if coordination.failure_elsewhere():
                time.sleep(_GRACE)
                if not self._done.is_set():
                    coordination.fail_with(coordination.failure_elsewhere())

    def _end_hanging(self) -> None:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        coordination.fail(
            Failure(
                1,
                f"nothing goes on for {self._hang_minutes:g} minutes (config.hang_minutes): the "
                "stacks of all threads are above; resume with the same command",
            )
        )
