"""Values of flags as people write them: ``1e2`` for a whole number, ``None`` for a field unset."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from mimicnorm_jax.config import FIELDS
from mimicnorm_jax.errors import UserError, shown

_PREFIX = "config."
_NUMBER = re.compile(r"[+-]?\d[\d_]*(\.\d*)?([eE]\+?\d{1,2})?")
_UNSET = ("", "none", "null")
_TRUTHS = ("true", "t", "1", "false", "f", "0")
# Whole numbers beyond it are a slip of the hand everywhere, and a list of so many fills the memory.
_LARGEST = 2**40


class Read(NamedTuple):
    """A command line, read.

    Attributes:
      argv: it, with whole numbers as ``int`` takes them, and without fields that are unset.
      unset: these fields.
    """

    argv: list[str]
    unset: tuple[str, ...]


def read_values(argv: Sequence[str]) -> Read:
    """Brings the values of flags into the form that the parsers of flags take.

    Args:
      argv: the program and its arguments.

    Raises:
      UserError: no whole number, or neither true nor false, where it must be one.
    """
    kept: list[tuple[str, list[str]]] = []  # a flag's name, and the words that set it
    unset: dict[str, None] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-") if word.startswith("-") else ""
        if not _takes_value(name):
            kept.append((name, [word]))
            continue
        if not equals and _is_switch(name):
            kept.append((name, [word]))
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                kept.append((name, [word]))
                continue
            value = following
        field = name.removeprefix(_PREFIX)
        unset.pop(field, None)  # the last one counts
        if _is_optional(name) and value.strip().lower() in _UNSET:
            unset[field] = None
            kept = [(flag, these) for flag, these in kept if flag != name]
        else:
            value = _whole(name, value) if _is_whole(name) else value
            if _is_switch(name) and value.lower() not in _TRUTHS:
                raise UserError(f"--{name}={shown(value)} is neither true nor false")
            kept.append((name, [f"--{name}={value}"]))
    return Read([word for _, these in kept for word in these], tuple(unset))


def _is_switch(name: str) -> bool:
    """Whether it may stand alone, which says that it is true."""
    if not name.startswith(_PREFIX):
        return False
    field = FIELDS[name.removeprefix(_PREFIX)]
    return (field.kind or type(field.default)) is bool


def _takes_value(name: str) -> bool:
    return name.removeprefix(_PREFIX) in FIELDS if name.startswith(_PREFIX) else _is_whole(name)


def _is_optional(name: str) -> bool:
    return name.startswith(_PREFIX) and FIELDS[name.removeprefix(_PREFIX)].default is None


def _is_whole(name: str) -> bool:
    if name.startswith(_PREFIX):
        field = FIELDS[name.removeprefix(_PREFIX)]
        return (field.kind or type(field.default)) is int
    return name in flags.FLAGS and isinstance(flags.FLAGS[name].parser, flags.IntegerParser)


def _whole(name: str, text: str) -> str:
    """``1e2`` as ``100``."""
    if _NUMBER.fullmatch(text.strip()):
        value = float(text)
        if value.is_integer() and abs(value) < _LARGEST:
            return str(int(value))
    try:
        int(text, 0)
    except ValueError:
        raise UserError(f"--{name}={shown(text)} is not a whole number") from None
    return text


def check_numbers() -> None:
    """Raises ``UserError`` unless the values of all flags that were parsed are numbers to use."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        if not flag.present or name.startswith(_PREFIX):  # a field's range is checked elsewhere
            continue
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name}={value} is not allowed; allowed: a finite number")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UserError(
                    f"--{name}={shown(value)} is not allowed; allowed: a smaller number"
                )
