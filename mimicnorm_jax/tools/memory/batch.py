"""The largest batch that fits into the memory of a device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from mimicnorm_jax.errors import UserError

_MOST = 2**20


_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``"16GiB"``.

    Raises:
      UserError: it is no such size.
    """
    match = re.fullmatch(rf"([\d.]+) ?({'|'.join(_UNITS)})", text)
    with contextlib.suppress(ValueError, OverflowError):
        size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
        if size > 0:
            return size
    raise UserError(f"--hbm={text!r} is no size such as 16GiB or 80GB")


def largest_batch(
    peak: Callable[[int], int], limit: int, *, multiple: int, start: int
) -> tuple[int, int]:
    """The largest batch that fits, and its peak.

    Memory grows nearly in proportion, so lines through what is known find it in a few steps.

    Args:
      peak: bytes of a batch.
      limit: bytes that there are.
      multiple: what a batch is a multiple of.
      start: the first guess.

    Returns:
      A multiple of ``multiple``, at most 2**20 of them (0: not even one fits), and its peak.
    """
    fits: tuple[int, int] = (0, 0)
    fails: tuple[int, int] | None = None
    guess = max(1, start // multiple)
    while fits[0] < _MOST and (fails is None or fails[0] - fits[0] > 1):
        bytes_ = peak(guess * multiple)
        if bytes_ <= limit:
            slope = (bytes_ - fits[1]) / (guess - fits[0])
            fits = (guess, bytes_)
        else:
            slope = bytes_ / guess if fails is None else (fails[1] - bytes_) / (fails[0] - guess)
            fails = (guess, bytes_)
        line = fits[0] + int((limit - fits[1]) / slope) if slope > 0 else 2 * fits[0]
        if fails is None:  # a little below the line, and never more than twice as far
            below = int(0.99 * line)
            guess = below if below > 1.01 * fits[0] else line
            guess = min(max(fits[0] + 1, guess), 2 * fits[0], _MOST)
        else:
            middle = (fits[0] + fails[0]) // 2
            inside = fits[0] < line < fails[0] and fails[0] - fits[0] > 8
            guess = max(fits[0] + 1, line if inside else middle)
            guess = min(guess, fails[0] - 1)
    return fits[0] * multiple, fits[1]
