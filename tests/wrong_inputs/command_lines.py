"""Wrong, odd and right values for every flag of every program and every configuration field."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from mimicnorm_jax.config import FIELDS

_PROGRAM_FLAGS = json.loads(
    (pathlib.Path(__file__).parent.parent / "program_flags.json").read_text()
)
_OF_PLACE = ("coordinator", "num-processes", "process-id")

# What makes a command line of a program but for one flag; no program has a run to read.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "mimicnorm_jax.main": ("--config=digits_resnet20", "--workdir=run"),
    "mimicnorm_jax.paper": ("figure4",),
    "mimicnorm_jax.tools.benchmark": ("step", "--config=digits_resnet20"),
    "mimicnorm_jax.tools.campaign": ("train", "--config=digits_resnet20"),
    "mimicnorm_jax.tools.export": ("run",),
    "mimicnorm_jax.tools.gradient_error": ("--config=digits_resnet20",),
    "mimicnorm_jax.tools.loss_floor": (),
    "mimicnorm_jax.tools.memory": ("--config=digits_resnet20",),
    "mimicnorm_jax.tools.networks": (),
    "mimicnorm_jax.tools.predict": ("run", "image.png"),
    "mimicnorm_jax.tools.prepare_data": ("cifar100", "--data-dir=data", "--check"),
    "mimicnorm_jax.tools.probe": ("--config=digits_resnet20",),
    "mimicnorm_jax.tools.verify": ("run",),
}

# Never numbers to use, and never whole ones.
NO_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "x" * 5000,
    "[1]",
    "{}",
    "NaN",
    "+inf",
    "a=b",
    "é",
    "1,5",
)
NO_WHOLE_NUMBERS = ("1.5", "9" * 20, "-" + "9" * 20, "1e30")
OTHERS = (
    *("-1", "0", "-0", "", "None", "1_000", "1e2", "(1,2)", "true", "0x10", "1e-400", "٣"),
    *("\udcff", "a\0b", "~", "/dev/full", "file", "folder", "nowhere/x", "file/x", "."),
    *(",", ",,", "'", '"', "(", ")", "*", "**", "[", "$HOME", "%s", "{x}", "--", "-", " "),
)


class Line(NamedTuple):
    """A command line.

    Attributes:
      program: the module that is run.
      arguments: its arguments.
      refused: whether it must be refused, whatever else it may be.
    """

    program: str
    arguments: tuple[str, ...]
    refused: bool


def _is_wrong(kind: type | None, value: str) -> bool:
    if kind in (int, float) and value in NO_NUMBERS:
        return True
    return kind is int and value in NO_WHOLE_NUMBERS


def _kind_of_flag(name: str) -> type | None:
    if name not in flags.FLAGS:
        return {"intervals": int, "seed": int}.get(name)
    parser = flags.FLAGS[name].parser
    kinds = ((flags.IntegerParser, int), (flags.FloatParser, float))
    return next((kind for known, kind in kinds if isinstance(parser, known)), None)


def _flags_of(program: str) -> list[str]:
    startup = (*_OF_PLACE, "wait-seconds", "heartbeat-seconds", "distributed")
    return [*_PROGRAM_FLAGS[program], *(startup if program.endswith("main") else ())]


def _others_of_place(name: str) -> tuple[str, ...]:
    """What goes with a flag that places a process among others."""
    if name not in (*_OF_PLACE, "wait-seconds", "heartbeat-seconds"):
        return ()
    place = {"coordinator": "localhost:1", "num-processes": "2", "process-id": "0"}
    return tuple(f"--{other}={value}" for other, value in place.items() if other != name)


def lines() -> Iterator[Line]:
    """Every command line that is tried."""
    values = (*NO_NUMBERS, *NO_WHOLE_NUMBERS, *OTHERS)
    for name, field in FIELDS.items():
        kind = field.kind or type(field.default)
        for value in values:
            arguments = (*PROGRAMS["mimicnorm_jax.main"], f"--config.{name}={value}")
            yield Line("mimicnorm_jax.main", arguments, _is_wrong(kind, value))
    assert PROGRAMS.keys() == _PROGRAM_FLAGS.keys()
    for program, arguments in PROGRAMS.items():
        importlib.import_module(program_module(program))  # which defines its flags
        for name in _flags_of(program):
            kind = _kind_of_flag(name)
            for value in values:
                given = (*arguments, *_others_of_place(name), f"--{name}={value}")
                yield Line(program, given, _is_wrong(kind, value))
        yield Line(program, (*arguments, "--nonsense"), True)
        yield Line(program, (*arguments, "--nonsense=1"), True)
        yield Line(program, (*arguments, "\udcff"), program not in ("mimicnorm_jax.tools.predict",))


def program_module(program: str) -> str:
    """The module with the program's ``main``."""
    module = importlib.import_module(program)
    return program if hasattr(module, "main") else f"{program}.__main__"
