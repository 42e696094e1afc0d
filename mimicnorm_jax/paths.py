"""Paths as people write them, in every flag and every field alike."""

from __future__ import annotations

import os
import pathlib
import re

from absl import flags

from mimicnorm_jax.errors import UserError, shown

flags.disclaim_key_flags()  # those that are defined here are of the modules that ask for it


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path in which ``~`` and ``$VARIABLES`` are replaced.

    No shell does that behind ``--flag=``, nor in a configuration.

    Args:
      path: such as ``"~/photos"`` or ``"$SCRATCH/photos"``.

    Raises:
      UserError: see ``expanded_text``.
    """
    return pathlib.Path(expanded_text(os.fspath(path)))


def expanded_text(text: str) -> str:
    """The same of text that may be an address, such as ``gs://…``, which is no path.

    Raises:
      UserError: it has a zero byte, which no system takes in a path; or it names a variable that
        is not set, or the home of nobody, and would become a folder of that name.
    """
    if "\0" in text:
        raise UserError(f"{shown(text)} is no path: it has a zero byte")
    for name in (a or b for a, b in _VARIABLE.findall(text)):
        if name not in os.environ:
            raise UserError(f"{shown(text)}: the variable ${name} is not set")
    path = os.path.expanduser(os.path.expandvars(text))
    if text.startswith("~") and path == text and not os.path.lexists(text.split("/")[0]):
        raise UserError(f"{shown(text)}: there is no user {shown(text.split('/')[0][1:])}")
    return path


class _PathParser(flags.ArgumentParser[str]):
    """Expands the value of a flag."""

    def parse(self, argument: str) -> str:
        return expanded_text(argument)

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, default: str | None, explained: str) -> flags.FlagHolder[str | None]:
    """Defines a flag whose value is a path.

    Args:
      name: of the flag.
      default: its value where it is not given.
      explained: what ``--help`` says of it.
    """
    return flags.DEFINE(
        _PathParser(), name, default, explained, serializer=flags.ArgumentSerializer()
    )
