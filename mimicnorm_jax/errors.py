"""The exceptions a person, not a programmer, is meant to read."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Iterable, Iterator

_MOST_LISTED = 30  # names
_MOST_PRINTED = 300  # characters of the beginning and of the end of a message
_MOST_QUOTED = 200  # of a library's
_LONGEST = 80  # characters of what was given


class UserError(ValueError):
    """A wrong input: a field, a file or an argument.

    The message is one line that names what was given and what is allowed. The
    command-line programs print it without a traceback and exit with code 2.
    """


class RunError(RuntimeError):
    """What ends a run that was well started: a full disk, a lost process, a hang.

    The command-line programs print it in one line and exit with code 1.
    """


class NonFiniteError(RunError):
    """The loss, the gradient or a parameter became infinite or NaN."""


@contextlib.contextmanager
def refused_by_system(what: str) -> Iterator[None]:
    """Turns an ``OSError`` inside the ``with`` block into a ``UserError``.

    Args:
      what: begins the message, such as ``"--workdir=runs/a cannot be used"``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error


def of_system(error: OSError) -> str:
    """What the system refuses, and of which file."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror or error}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, if need be cut, or its name where it has none."""
    return _cut(next(iter(str(error).splitlines()), "") or type(error).__name__, _MOST_QUOTED)


def one_line(message: str) -> str:
    """A message as a program prints it: without line breaks, and no longer than a person reads."""
    return _cut(" ".join(message.splitlines()), _MOST_PRINTED)


def _cut(line: str, most: int) -> str:
    """Its beginning and its end, where a library often says the cause."""
    return line if len(line) <= 2 * most else f"{line[:most]} … {line[-most:]}"


def print_anything() -> None:
    """Lets this process print what its terminal has no letters for: as escapes, not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has its own
            stream.reconfigure(errors="backslashreplace")


def shown(value: object) -> str:
    """A value as Python writes it, and no more of it than a line has room for."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def unknown(kind: str, given: object, allowed: Iterable[str]) -> UserError:
    """Builds the error for a name that is not among the allowed ones.

    Args:
      kind: what the name stands for, such as ``"network"``.
      given: the name that was given.
      allowed: the names that exist.

    Returns:
      A ``UserError`` that says the nearest of the allowed names, and lists them unless they are
      many.
    """
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if near and len(names) > _MOST_LISTED:
        return UserError(f"unknown {kind} {shown(given)}{hint}")
    listed = ", ".join(names[:_MOST_LISTED]) if names else "none"
    if len(names) > _MOST_LISTED:
        listed += f" and {len(names) - _MOST_LISTED} more"
    return UserError(f"unknown {kind} {shown(given)}{hint}; allowed: {listed}")
