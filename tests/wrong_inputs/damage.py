"""What can be wrong with a JSON file: its bytes, its keys, the kinds of its values.

``damages`` makes every case, ``sample`` a part of them, by a seed. ``outcome`` says how a reader
answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mimicnorm_jax.errors import RunError, UserError

REFUSALS = (UserError, RunError)

# One of each kind, and those at which a program stumbles.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "half": 0.5,
    "a 20-digit number": 10**20,
    "infinity": float("inf"),
    "nan": float("nan"),
    "an empty word": "",
    "a word": "mimicnrom",
    "a long word": "x" * 5000,
    "a zero byte": "a\0b",
    "half a surrogate": "\udcff",
    "an empty list": [],
    "a list of nulls": [None, None],
    "a list of words": ["a", "b"],
    "a list in a list": [[1], [2]],
    "an empty object": {},
    "an object": {"a": 1},
}

BYTES: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "latin-1": '{"a": "ä"}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": '{"a": 1}'.encode("utf-8-sig"),
    "no object": b"[1, 2]",
    "null": b"null",
    "a word": b'"summary"',
    "two objects": b"{}{}",
    "a trailing comma": b'{"a": 1,}',
    "deep nesting": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep lists that end": b'{"a": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    "an empty object": b"{}",
    "a number of 10,000 digits": b'{"format": 1' + b"0" * 10_000 + b"}",
}


class Damage(NamedTuple):
    """A file that is not what the program wrote.

    Attributes:
      name: what is wrong, in words.
      content: of the file.
    """

    name: str
    content: bytes


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inside in items:
        yield from _places(inside, (*path, key))


def _changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    key, *rest = path
    copy = dict(value)
    if not rest and to is _GONE:
        del copy[key]
    else:
        copy[key] = _changed(value[key], tuple(rest), to)
    return copy


_GONE = object()


def _text(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damages(content: bytes) -> Iterator[Damage]:
    """Every damage to a file that holds a JSON object."""
    for name, other in BYTES.items():
        yield Damage(name, other)
    for part in (1, len(content) // 2, len(content) - 3):
        yield Damage(f"its first {part} bytes", content[:part])
    whole = json.loads(content)
    for path in _places(whole):
        said = ".".join(map(str, path))
        yield Damage(f"{said} is gone", _text(_changed(whole, path, _GONE)))
        for name, value in VALUES.items():
            yield Damage(f"{said} is {name}", _text(_changed(whole, path, value)))


def sample(content: bytes, count: int, seed: int) -> list[Damage]:
    """Each kind of bytes, and ``count`` of the changed keys and values."""
    every = list(damages(content))
    kinds, others = every[: len(BYTES) + 3], every[len(BYTES) + 3 :]
    return [*kinds, *random.Random(seed).sample(others, min(len(others), count))]


def outcome(reader: Callable[[], Any], begun: type[BaseException] | None = None) -> str:
    """How a reader answers: "refused", "no harm", "goes on", or what is wrong with its answer.

    Args:
      reader: reads a damaged file.
      begun: what it raises where a run would go on.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            reader()
        except REFUSALS as error:
            line = str(error)
            if "\n" in line or len(line) > 700:
                return f"a long line: {line[:100]!r}"
            return "refused"
        except BaseException as error:
            if begun is not None and isinstance(error, begun):
                return "goes on"
            return f"{type(error).__name__}: {str(error)[:200]}"
    return "no harm"


def assert_well_answered(found: Mapping[str, Sequence[Any]], what: str, *, at_least: int) -> None:
    """Asserts that each answer is a good one, and that enough of them refuse; prints counts."""
    counts = {how: len(which) for how, which in found.items()}
    print(what, counts)
    bad = counts.keys() - {"goes on", "refused", "no harm"}
    assert not bad, {how: found[how][:4] for how in bad}
    assert counts["refused"] >= at_least
