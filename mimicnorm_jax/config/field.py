"""What a field of the configuration is, and the ranges of its values.

A range is what ``Field`` takes as ``allowed`` and ``check``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

# Epochs are counted exactly, in millionths; more of them than this are a slip of the hand.
SHORTEST, LONGEST = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the configuration.

    Attributes:
      default: the default value.
      meaning: what it does, with the unit where there is one.
      choices: the allowed values, where they are names.
      allowed: the allowed values in words, where they are a range.
      check: whether a value is in that range.
      kind: type of the value where the default, None, does not say.
    """

    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    allowed: str = ""
    check: Callable[[Any], bool] | None = None
    kind: type | None = None

    def accepts(self, value: Any) -> bool:
        """Whether a value is in the allowed range."""
        try:
            return self.check is None or self.check(value)
        except (
            AttributeError,
            TypeError,
            ValueError,
            OverflowError,
        ):  # such as a word among numbers
            return False

    def describe(self) -> str:
        """The allowed values, for people."""
        words = " | ".join(self.choices) if self.choices else self.allowed
        return words + (" (or unset)" if self.default is None else "")


def at_least(low: float, most: float = math.inf) -> dict[str, Any]:
    """Of numbers from ``low`` to ``most``."""
    words = f">= {low:g}" if most == math.inf else f"{low:g} to {most:.10g}"
    return {"allowed": words, "check": lambda v: math.isfinite(v) and low <= v <= most}


def above(low: float, most: float = math.inf) -> dict[str, Any]:
    """Of numbers above ``low``, to ``most``."""
    words = f"> {low:g}" + ("" if most == math.inf else f", <= {most:g}")
    return {"allowed": words, "check": lambda v: math.isfinite(v) and low < v <= most}


def in_unit_interval() -> dict[str, Any]:
    """Of numbers from 0 to below 1."""
    return {"allowed": "0 <= value < 1", "check": lambda v: 0 <= v < 1}


def each(allowed: str, check: Callable[[Any], bool]) -> dict[str, Any]:
    """Of sequences, each of whose values passes ``check``."""
    return {"allowed": allowed, "check": lambda values: all(check(v) for v in values)}


def pair(above: float, most: float) -> dict[str, Any]:
    """Of two numbers in order, above ``above``, to ``most``."""
    words = f"two numbers, the first not greater, each > {above:g} and <= {most:g}"
    return {"allowed": words, "check": lambda v: len(v) == 2 and above < v[0] <= v[1] <= most}


def colour() -> dict[str, Any]:
    """Of red, green and blue."""

    def is_colour(values: Any) -> bool:
        return len(values) == 3 and all(0 <= v <= 255 and v == int(v) for v in values)

    return {"allowed": "three whole numbers, 0 to 255", "check": is_colour}


def true_or_false() -> dict[str, Any]:
    """Of true and false."""
    return {"allowed": "true | false", "check": lambda v: isinstance(v, bool)}


def rate(value: str) -> tuple[str, float]:
    """Pattern and factor of ``PATTERN=FACTOR``; the pattern may have a ``=`` too.

    Raises:
      ValueError: there is no number behind the last ``=``.
    """
    pattern, _, factor = value.rpartition("=")
    return pattern, float(factor)


def is_rate(value: str) -> bool:
    """Whether a value is ``PATTERN=FACTOR``, with a regular expression and a number from 0 on."""
    pattern, factor = rate(value)
    return pattern != "" and is_regex(pattern) and 0 <= factor < math.inf


def is_regex(value: str) -> bool:
    """Whether a value is a regular expression."""
    try:
        re.compile(value)
    except re.error:
        return False
    return True
