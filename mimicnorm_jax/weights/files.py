"""Files of weights as plain arrays: safetensors, and what ``torch.save`` writes."""

from __future__ import annotations

import importlib
import os
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mimicnorm_jax.errors import UserError, first_line, refused_by_system, unknown

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Where training scripts put the state dict; the averaged ones only where there is no other.
_NESTED = ("state_dict", "model", "model_state", "model_state_dict")
_NESTED_LAST = ("state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
_LISTED = 4
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside what it averages


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a file of weights.

    Checkpoints of training scripts are looked into: a state dict below ``state_dict``, ``model``
    or ``model_state`` is taken out, and the prefixes of ``DataParallel`` and ``torch.compile``
    are cut off. Of a PyTorch file only tensors are read: no code in it is run.

    Args:
      path: ``.safetensors``, which needs safetensors; ``.pth``, ``.pt`` or ``.bin``, which need
        torch.

    Returns:
      The arrays by their names, in the file's types; floats of 16 bits and fewer as float32.

    Raises:
      UserError: the file is missing, damaged, of another kind, holds more than tensors, or needs
        a library that is not installed.
    """
    file = pathlib.Path(path)
    _check_readable(file)
    if file.suffix not in SUFFIXES:
        raise unknown("suffix of a file of weights", file.suffix, SUFFIXES)
    content = _read_torch(file) if file.suffix in TORCH_SUFFIXES else read_safetensors(file)
    tensors = _without_prefixes(_state_dict(content, file))
    try:
        return {name: _array(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # of sparse and quantized tensors, each of its own type
        raise UserError(f"{file} has a tensor that is no array: {first_line(error)}") from error


def check_shapes(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Compares names and shapes with those of a network.

    Args:
      tensors: what there is.
      expected: the shapes that the network asks for.
      what: begins the message.

    Raises:
      UserError: it lists what is missing, too much, or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    unused = [name for name in tensors if name not in expected]
    other = [
        f"{name} has the shape {tensors[name].shape}, and the network needs {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    said = [f"missing: {listed(missing)}"] if missing else []
    said += [f"not in the network: {listed(unused)}"] if unused else []
    said += [listed(other)] if other else []
    if said:
        raise UserError(f"{what} does not fit the network: {'; '.join(said)}")


def listed(names: Iterable[str], *, separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    every = list(names)
    more = f"{separator}and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return separator.join(every[:_LISTED]) + more


def read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """The arrays of a file of safetensors, as they are, by the names that they have there.

    Raises:
      UserError: the file is missing or damaged, or safetensors is not installed.
    """
    file = pathlib.Path(path)
    _check_readable(file)
    try:
        numpy = importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise UserError(f'{file} needs safetensors: pip install "mimicnorm-jax[export]"') from error
    importlib.import_module("ml_dtypes")  # gives NumPy the type bfloat16, by its name
    try:
        arrays: dict[str, np.ndarray] = numpy.load_file(file)
        return arrays
    except Exception as error:  # also TypeError and AttributeError, of types NumPy does not have
        raise UserError(f"{file} is damaged or no safetensors: {first_line(error)}") from error


def _check_readable(file: pathlib.Path) -> None:
    with refused_by_system(f"{file} cannot be read"):
        file.open("rb").close()


def _read_torch(file: pathlib.Path) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"{file} needs torch: pip install torch, or convert the file to .safetensors"
        ) from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make of it
        raise _unread_by_torch(file, error) from error


def _unread_by_torch(file: pathlib.Path, error: Exception) -> UserError:
    """What ``torch.load`` says at length, some of it a way to run the file's code."""
    said = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", said)
    if code:
        return UserError(
            f"{file} holds more than tensors ({code[1]}), and code in it is not run: save only "
            "model.state_dict(), or .safetensors"
        )
    if "TorchScript" in said:
        return UserError(f"{file} is a TorchScript program: save its state_dict()")
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"{file} is damaged or no PyTorch file: it has more than tensors")
    return UserError(f"{file} is damaged or no PyTorch file: {first_line(error)}")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(map(_is_tensor, content.values()))


def _state_dict(content: Any, file: pathlib.Path) -> dict[str, Any]:
    """The state dict that a file is, or has one level below."""
    if _is_state_dict(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict")
    for key in (*_NESTED, *_NESTED_LAST):
        if _is_state_dict(content.get(key)):
            return dict(content[key])
    keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
    raise UserError(f"{file} is no state dict, nor has one at {', '.join(_NESTED)}; it has {keys}")


def _without_prefixes(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors without what all their names begin with, of several wrappers too."""
    for _ in _PREFIXES:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors if name != COUNTER):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _array(tensor: Any) -> np.ndarray:
    """A tensor of either library as an array."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach()
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()  # NumPy has no bfloat16
        return np.asarray(tensor.numpy())
    narrow = tensor.dtype.kind in "fV" and tensor.dtype.itemsize < 4  # V: of ml_dtypes
    return tensor.astype(np.float32) if narrow else tensor
