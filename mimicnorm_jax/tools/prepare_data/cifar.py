"""CIFAR-10 and CIFAR-100 in the two forms in which they are published.

The form for Python is pickled. A pickle is a program that may start others, so it is not run: its
few instructions that build numbers, strings, lists, dictionaries and one kind of array are
followed here, and any other is refused.
"""

from __future__ import annotations

import pathlib
import pickletools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.errors import UserError, first_line, unknown
from mimicnorm_jax.tools.prepare_data.records import Pixels, Records

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
_FORMS: dict[str, dict[str, list[str]]] = {  # files of the splits
    "python CIFAR-10": {"train": _TRAIN, "test": ["test_batch"]},
    "python CIFAR-100": {"train": ["train"], "test": ["test"]},
    "binary CIFAR-10": {"train": [f"{name}.bin" for name in _TRAIN], "test": ["test_batch.bin"]},
    "binary CIFAR-100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_MARKS: dict[str, tuple[str, ...]] = {  # files that tell them from others
    "python CIFAR-10": ("data_batch_1",),
    "python CIFAR-100": ("train", "meta"),
    "binary CIFAR-10": ("data_batch_1.bin",),
    "binary CIFAR-100": ("train.bin", "fine_label_names.txt"),
}
_KINDS = ("fine", "coarse")  # of CIFAR-100's labels


def form_of(folder: pathlib.Path) -> str:
    """Which form of CIFAR a folder has; ``""`` where it has none."""
    for form, names in _MARKS.items():
        if all((folder / name).is_file() for name in names):
            return form
    return ""


def read_cifar(folder: pathlib.Path, label: str) -> dict[str, Records]:
    """The splits in a folder.

    Args:
      folder: as its archive unpacks.
      label: of CIFAR-100: ``"fine"`` or ``"coarse"``; ``""``: fine.

    Raises:
      UserError: a file is missing or damaged, or is not what was published.
    """
    form = form_of(folder)
    kind = label or _KINDS[0]
    if kind not in _KINDS:
        raise unknown("label of CIFAR-100", kind, _KINDS)
    is_100, is_binary = form.endswith("100"), form.startswith("binary")
    names = _class_names(folder, is_100=is_100, is_binary=is_binary, kind=kind)
    found: dict[str, Records] = {}
    for split, files in _FORMS[form].items():
        for name in files:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing")
        read = _binary if is_binary else _pickled
        parts = [read(folder / name, is_100, kind) for name in files]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if labels.max() >= len(names):
            raise UserError(f"{folder}: labels go to {labels.max()}; there are {len(names)} names")
        images = pixels.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
        found[split] = Pixels(images, labels, names)
    return found


def _class_names(folder: pathlib.Path, *, is_100: bool, is_binary: bool, kind: str) -> list[str]:
    if is_binary:
        path = folder / (f"{kind}_label_names.txt" if is_100 else "batches.meta.txt")
        if not path.is_file():
            raise UserError(f"{path} is missing")
        return path.read_text().split()
    path = folder / ("meta" if is_100 else "batches.meta")
    if not path.is_file():
        raise UserError(f"{path} is missing")
    names = read_pickle(path).get(f"{kind}_label_names" if is_100 else "label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} has no names of classes")
    return names


def _binary(path: pathlib.Path, is_100: bool, kind: str) -> tuple[np.ndarray, np.ndarray]:
    labels = 2 if is_100 else 1  # coarse, then fine
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (labels + _PIXELS):
        raise UserError(
            f"{path} has {len(content)} bytes, which are no examples of {labels + _PIXELS}"
        )
    rows = content.reshape(-1, labels + _PIXELS)
    return rows[:, labels:], rows[:, 0 if is_100 and kind == "coarse" else labels - 1]


def _pickled(path: pathlib.Path, is_100: bool, kind: str) -> tuple[np.ndarray, np.ndarray]:
    content = read_pickle(path)
    pixels, labels = content.get("data"), content.get(f"{kind}_labels" if is_100 else "labels")
    if (
        not isinstance(pixels, np.ndarray)
        or not isinstance(labels, list)
        or pixels.shape != (len(labels), _PIXELS)
        or not labels
        or not all(type(value) is int and 0 <= value < 100 for value in labels)
    ):
        raise UserError(f"{path} is no batch of CIFAR")
    return pixels, np.array(labels, np.int64)


class _Made:
    """What a call of a global makes: its arguments, and what it is filled with later."""

    def __init__(self, name: str, arguments: Any):
        self.name, self.arguments = name, arguments
        self.filled: Any = None


_PUSHED = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_GLOBALS = (*_ARRAY, "numpy ndarray", "numpy dtype", "_codecs encode")


def read_pickle(path: pathlib.Path) -> dict[str, Any]:
    """The dictionary in a pickle, without running it.

    Args:
      path: of a file with numbers, strings, lists, tuples, dictionaries and arrays of uint8 only.

    Returns:
      Keys and strings as ``str``, arrays as uint8.

    Raises:
      UserError: it has anything else, or is damaged.
    """
    try:
        return _plain(_follow(path.read_bytes()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever damaged instructions make of it
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def _follow(program: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # where on the stack lists and tuples begin
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        return last(len(stack) - marks.pop())

    def last(count: int) -> list[Any]:
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    def set_items(values: Sequence[Any]) -> None:
        stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def build() -> None:
        state = stack.pop()
        stack[-1].filled = state

    def call() -> None:
        arguments = stack.pop()
        stack.append(_Made(stack.pop(), arguments))

    changes: dict[str, Callable[[], Any]] = {
        "MARK": lambda: marks.append(len(stack)),
        "NONE": lambda: stack.append(None),
        "NEWTRUE": lambda: stack.append(True),
        "NEWFALSE": lambda: stack.append(False),
        "EMPTY_DICT": lambda: stack.append({}),
        "EMPTY_LIST": lambda: stack.append([]),
        "EMPTY_TUPLE": lambda: stack.append(()),
        "DICT": lambda: stack.append(_pairs(since_mark())),
        "LIST": lambda: stack.append(since_mark()),
        "TUPLE": lambda: stack.append(tuple(since_mark())),
        "TUPLE1": lambda: stack.append((stack.pop(),)),
        "TUPLE2": lambda: stack.append(tuple(last(2))),
        "TUPLE3": lambda: stack.append(tuple(last(3))),
        "SETITEM": lambda: set_items(last(2)),
        "SETITEMS": lambda: set_items(since_mark()),
        "APPEND": lambda: (value := stack.pop(), stack[-1].append(value)),
        "APPENDS": lambda: (values := since_mark(), stack[-1].extend(values)),
        "BUILD": build,
        "REDUCE": call,
        "MEMOIZE": lambda: memo.__setitem__(len(memo), stack[-1]),
        "PROTO": lambda: None,
        "FRAME": lambda: None,
    }
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name == "STOP":
            return stack.pop()
        if name in changes:
            changes[name]()
        elif name == "GLOBAL":
            stack.append(_allowed(str(argument)))
        elif name == "STACK_GLOBAL":
            stack.append(_allowed(" ".join(last(2))))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in _PUSHED:
            stack.append(argument)
        else:
            raise UserError(f"it has the instruction {name}, which no batch of CIFAR has")
    raise ValueError("it ends too early")


def _pairs(values: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _allowed(name: str) -> str:
    if name not in _GLOBALS:
        raise UserError(f"it names {name.replace(' ', '.')}, which no batch of CIFAR does")
    return name


def _plain(made: Any) -> dict[str, Any]:
    """The dictionary, once all that was built is there; nothing in it is nested deeper."""
    if not isinstance(made, dict):
        raise ValueError("it is no dictionary")
    return {_text(key): _value(inner) for key, inner in made.items()}


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(inner) for inner in value]
    return _array(value) if isinstance(value, _Made) and value.name in _ARRAY else _text(value)


def _text(value: Any) -> Any:
    """A number or a string, however the pickle has it."""
    if isinstance(value, _Made):  # bytes as Python 3 writes them for Python 2
        if value.name != "_codecs encode" or value.arguments[1] != "latin1":
            raise UserError(f"it makes a {value.name.replace(' ', '.')}")
        value = value.arguments[0]
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("latin-1")
    if value is None or isinstance(value, int | float | str):
        return value
    raise UserError(f"it has a {type(value).__name__} where no batch of CIFAR has one")


def _array(made: _Made) -> np.ndarray:
    assert made.filled is not None
    _, shape, kind, is_fortran, content = made.filled
    if not isinstance(kind, _Made) or kind.name != "numpy dtype" or kind.arguments[0] != "u1":
        raise UserError("it has an array that is not of uint8")
    data = np.frombuffer(_text(content).encode("latin-1"), np.uint8)
    return data.reshape(shape, order="F" if is_fortran else "C")
