"""What the processes of a run tell each other beside the batches: agreement, barriers, failures.

It goes through the key-value store of JAX's coordination service, which lives in process 0. A
run of a single process needs none of it: it agrees with itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from mimicnorm_jax.errors import RunError, UserError, first_line, one_line
from mimicnorm_jax.progress_bar import goes_on

T = TypeVar("T")

# Start-up reads whole data sets, on machines of which one may be slower than another.
_MOST_SECONDS = 1800.0
_GRACE = 2.0  # seconds in which the process that failed first has said why
_names = itertools.count()  # equal in all processes: they agree on the same things in order


class Failure(NamedTuple):
    """Why a process ended: its exit code and message."""

    code: int
    message: str


def _state() -> Any:
    # The store has no public name yet (Orbax takes it from here too), and JAX's public names
    # would start the backend.
    from jax._src import distributed

    return distributed.global_state


def process_index() -> int:
    """Index of this process in its run; starts no backend."""
    return int(_state().process_id)


def process_count() -> int:
    """Number of processes of this run; starts no backend."""
    return int(_state().num_processes)


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for the run."""
    return process_index() == 0


def name_of(process: int) -> str:
    """``process 3/8``."""
    return f"process {process}/{process_count()}"


def exchange(what: str, value: Any, *, seconds: float = _MOST_SECONDS) -> list[Any]:
    """What every process says, by process; each must call this, in the same order.

    Args:
      what: names the exchange, for people.
      value: what this process says, as JSON.
      seconds: how long to wait for another process.

    Raises:
      RunError: a process did not answer in time.
    """
    if process_count() == 1:
        return [value]
    client, name = _state().client, f"mimicnorm/exchange/{next(_names)}"
    client.key_value_set(f"{name}/{process_index()}", json.dumps(value))
    deadline = time.monotonic() + seconds
    return [
        _await(f"{name}/{process}", deadline, process, what) for process in range(process_count())
    ]


def _await(key: str, deadline: float, process: int, what: str) -> Any:
    while True:
        goes_on()  # here: the other process has its own watchdog
        try:  # for a second at a time, so that Ctrl-C is heard
            return json.loads(_state().client.blocking_key_value_get(key, 1000))
        except Exception as error:  # JAX does not promise which
            if others := failure_elsewhere():
                fail_with(others)
            if time.monotonic() > deadline or "DEADLINE_EXCEEDED" not in str(error):
                raise RunError(
                    f"no answer from {name_of(process)} ({what}): {first_line(error)}"
                ) from error


def together(what: str, do: Callable[[], T]) -> T:
    """Calls a function in every process; what one finds wrong stops all of them.

    Args:
      what: names it, for people.
      do: may raise ``UserError``.

    Raises:
      UserError: that of the first process that has one, in every process.
    """
    result, error = None, None
    try:
        result = do()
    except UserError as raised:
        if process_count() == 1:
            raise
        error = raised
    messages = exchange(what, None if error is None else str(error))
    failed = [(process, message) for process, message in enumerate(messages) if message]
    if failed:
        process, message = failed[0]
        prefix = "" if len(set(messages)) == 1 else f"{name_of(process)}: "
        raise UserError(prefix + message) from error
    return result  # type: ignore[return-value]


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    exchange(what, None)


_FAILURES = "mimicnorm/failure/"
_LEFT = "mimicnorm/left/"


def failures() -> dict[int, Failure]:
    """The failures of which this or another process has told, by process."""
    return {process: Failure(*said) for process, said in _told(_FAILURES).items()}


def _told(directory: str) -> dict[int, Any]:
    """What processes have told so far, by process."""
    client = _state().client
    if client is None:
        return {}
    try:
        found = client.key_value_dir_get(directory)
    except Exception:  # process 0, which holds the store, is gone
        return {}
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def _tell(directory: str, value: Any) -> None:
    with contextlib.suppress(Exception):  # process 0 is gone, or it was told before
        _state().client.key_value_set(f"{directory}{process_index()}", json.dumps(value))


def fail(failure: Failure) -> NoReturn:
    """Ends this process, and tells the others of its run, if there are any, why.

    Says it unless process 0 says the same. Not an ordinary exit: at that JAX would wait for
    processes that do not come, and Python for threads that wait for what has failed.
    """
    _tell(_FAILURES, failure)
    if not is_first():
        time.sleep(_GRACE / 2)
    if is_first() or failures().get(0, Failure(0, "")).message != failure.message:
        print(f"error: {_own_name()}{one_line(failure.message)}", file=sys.stderr, flush=True)
    leave(failure.code)


def fail_with(others: dict[int, Failure]) -> NoReturn:
    """Ends this process because another one has failed."""
    process, failure = min(others.items())
    message = f"{name_of(process)} ended: {failure.message}"
    _tell(_FAILURES, Failure(1, message))
    print(f"error: {_own_name()}{one_line(message)}", file=sys.stderr, flush=True)
    leave(failure.code)


def _own_name() -> str:
    return "" if is_first() else f"{name_of(process_index())}: "


def leave(code: int) -> NoReturn:
    """Ends this process at once; process 0, which holds the store, after the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that is closed
            stream.flush()
    for worker in multiprocessing.active_children():  # they would wait for work for ever
        worker.kill()
    if not is_first():
        _tell(_LEFT, None)
    deadline = time.monotonic() + 3 * _GRACE
    while is_first() and len(_told(_LEFT)) < process_count() - 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    os._exit(code)


def is_told_to_stop() -> bool:
    """Whether JAX's preemption service was told in some process of the run that it is to stop."""
    try:
        return bool(_state().client.key_value_try_get("RECEIVED_PREEMPTION_NOTICE"))
    except Exception:  # nobody was told, or process 0, which holds the store, is gone
        return False


_ANSWERS = "mimicnorm/leaves/"


def leaves(whether: bool) -> None:
    """Tells the other processes whether this one leaves before the first step; once in a run."""
    _tell(_ANSWERS, whether)


def all_leave() -> bool | None:
    """Whether all processes have told that they leave; None: not all have answered."""
    answers = _told(_ANSWERS)
    if not all(answers.values()):
        return False
    return True if len(answers) == process_count() else None


def failure_elsewhere() -> dict[int, Failure]:
    """Failures of other processes."""
    return {p: failure for p, failure in failures().items() if p != process_index()}


# The processes of a run are connected by Gloo on CPUs, by NCCL on GPUs, and by the coordination
# service everywhere; none has an exception of its own.
_SIGNS_OF_LOST_CONTACT = ("Gloo", "NCCL", "UNAVAILABLE", "coordination service", "heartbeat")


def fail_unexpectedly(error: Exception) -> NoReturn:
    """Ends this process of a run of several after any other exception, and tells the others.

    Where it came from losing another process, says that in one line, with the reason if that
    process has told it; else prints the traceback.
    """
    text = str(error)
    if any(sign in text for sign in _SIGNS_OF_LOST_CONTACT):
        time.sleep(_GRACE)
        if others := failure_elsewhere():
            fail_with(others)
        fail(Failure(1, f"lost another process ({first_line(error)[:200]}); see what it says"))
    traceback.print_exception(error)
    fail(Failure(1, f"{type(error).__name__}: {text}"))
