"""A checkpoint that the system does not hand out now, which is no reason to call it damaged."""

from __future__ import annotations

import errno
import os
import pathlib
import re
from collections.abc import Iterator

# What is not where it belongs is damage; everything else that a system says may be over soon.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# TensorStore writes the system's number into its message, Python's OSError has it.
_NUMBER = re.compile(r"\bos_error_code='(\d+)'")


def why_unreadable(error: BaseException, folder: pathlib.Path) -> str | None:
    """Why a checkpoint could not be read, where that is no fault of its content.

    Args:
      error: what reading it raised.
      folder: of the checkpoint.

    Returns:
      In words; None where the files can be read, so that what they hold is wrong.
    """
    for raised in _chain(error):
        if isinstance(raised, MemoryError) or "RESOURCE_EXHAUSTED" in str(raised):
            return "out of memory"
        number = getattr(raised, "errno", None)
        if number is None and (found := _NUMBER.search(str(raised))):
            number = int(found.group(1))
        if number is not None and number not in _ABSENT:
            return os.strerror(number)
    return _refused(folder)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that it came from."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                yield from _chain(part)
        error = error.__cause__ or error.__context__


def _refused(folder: pathlib.Path) -> str | None:
    """What the system says now of the files: Orbax takes a forbidden folder for an empty one."""
    failed: list[OSError] = []
    for path, _, names in os.walk(folder, onerror=failed.append):
        for name in names:
            try:
                with (pathlib.Path(path) / name).open("rb") as file:
                    file.read(1)
            except OSError as error:
                failed.append(error)
    reasons = [error for error in failed if error.errno not in _ABSENT]
    return os.strerror(reasons[0].errno or 0) if reasons else None
