"""What PyTorch itself writes: tensors are read, code is not run."""

import argparse
import os
import warnings

import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.weights import read_tensors

pytestmark = pytest.mark.long
torch = pytest.importorskip("torch", reason="torch is missing: pip install torch")


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_tensors_and_checkpoints_are_read(suffix, tmp_path):
    file = tmp_path / f"w{suffix}"
    tensors = {
        "a": torch.tensor([1.5, 2.0], dtype=torch.bfloat16),
        "b": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "c": torch.arange(3),
        "d": torch.ones(2, 3, dtype=torch.float64).t(),
    }
    for content in (
        tensors,
        {"epoch": 1, "model": tensors, "args": {"lr": 0.1, "model": "resnet18"}},
        {"state_dict": {f"module.{n}": t for n, t in tensors.items()}, "best_acc1": tensors["c"]},
    ):
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            found = read_tensors(file)
            types = {name: value.dtype.name for name, value in found.items()}
            assert types == {"a": "float32", "b": "float32", "c": "int64", "d": "float64"}
            np.testing.assert_array_equal(found["a"], [1.5, 2.0])
            assert found["d"].shape == (3, 2)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_code_is_not_run(tmp_path):
    file, made = tmp_path / "w.pth", tmp_path / "made"
    for content, said in (
        ({"a": torch.ones(2), "b": Touches(made)}, r"holds more than tensors \(posix\.system\)"),
        ({"model": torch.nn.Linear(2, 2)}, r"holds more than tensors \(torch\.nn\.modules"),
        # as torchvision's and timm's training scripts keep their arguments
        ({"model": {}, "args": argparse.Namespace()}, r"than tensors \(argparse\.Namespace\)"),
        (torch.nn.Linear(2, 2), r"holds more than tensors \(torch\.nn\.modules"),
        ([torch.ones(2)], r"holds a list, not a state dict"),
        (torch.ones(2), r"holds a Tensor, not a state dict"),
        ({"a": torch.eye(2).to_sparse()}, r"w\.pth has a tensor that is no array"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=said) as caught:
            read_tensors(file)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not made.exists()


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for content in (b"", b"no file", whole[: len(whole) // 2], b"\x80\x02" + whole[:50]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.pth is damaged or no PyTorch file: ") as caught:
            read_tensors(file)
        assert "\n" not in str(caught.value)


def test_torchscript_is_refused(tmp_path):
    file = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    with pytest.raises(UserError, match=r"w\.pt is a TorchScript program: save its") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value)
