"""The JSON files of a run: read with a word on what is wrong, and written so as to be whole.

A folder of a run may come from someone else, or have been edited: nothing in it is believed before
it was looked at.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mimicnorm_jax.errors import UserError, refused_by_system, shown

_WORDS: dict[type | None, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    None: "null",
}

# Whole numbers beyond it are no numbers to NumPy, nor exact to other readers of JSON.
_LARGEST = 2**53

#: The kinds that a value may have; None stands for null. A float may be a whole number.
Kinds = tuple[type | None, ...]
NUMBER_OR_NULL: Kinds = (float, None)


def read_json(
    path: pathlib.Path, kinds: Mapping[str, type | Kinds] | None = None
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.
      kinds: of the values that are needed, by key.

    Raises:
      UserError: with the path, and the key, of what is damaged.
    """
    with refused_by_system(f"cannot read {path}"):
        content = path.read_bytes()
    return check_kinds(parse_object(content, str(path)), kinds or {}, str(path))


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      content: as it is stored.
      name: of the file, for the message.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise UserError(f"cannot read {name}: it is nested too deeply") from None
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"cannot read {name}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {name}: it holds no JSON object")
    return value


def check_kinds(
    value: dict[str, Any], kinds: Mapping[str, type | Kinds], name: str
) -> dict[str, Any]:
    """Returns ``value``, whose values are of the kinds that are needed.

    Args:
      value: a JSON object.
      kinds: by key.
      name: of the file, for the message.

    Raises:
      UserError: a key is missing, or has a value of another kind.
    """
    for key, allowed in kinds.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        words = " or ".join(_WORDS[kind] for kind in allowed)
        if key not in value:
            raise UserError(f"{name} is damaged: it has no {key} ({words})")
        if not any(_is(value[key], kind) for kind in allowed):
            raise UserError(f"{name} is damaged: {key} is {shown(value[key])}, not {words}")
    return value


def _is(value: Any, kind: type | None) -> bool:
    if kind is None or value is None:
        return value is kind
    if type(value) is int and abs(value) > _LARGEST:
        return False
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # true is a number to isinstance


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file that is never half there."""
    replace_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def without_link(path: pathlib.Path) -> pathlib.Path:
    """The path of a file to be written; a link that lies there goes."""
    if path.is_symlink():
        path.unlink()
    return path


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in the place of another, of which one or the other is there, whole.

    Also after a power failure: it is on the disk before it takes the name. A link that lies where
    it is drafted, or at its name, is replaced and not followed.
    """
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with draft.open("x") as file:  # which follows no link
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
