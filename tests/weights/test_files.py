"""Files of weights: what is read, what is unwrapped, what is refused and how."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.weights import read_tensors
from mimicnorm_jax.weights.files import _state_dict, _without_prefixes

TENSORS = {"conv1.weight": np.arange(6.0).reshape(2, 3), "bn1.bias": np.arange(2)}


def written(tmp_path, tensors, name="weights.safetensors"):
    save_file(tensors, tmp_path / name)
    return tmp_path / name


def test_safetensors_come_back_in_their_types(tmp_path):
    found = read_tensors(str(written(tmp_path, TENSORS)))
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_become_float32(tmp_path, narrow):
    value = np.array([1.5, -0.25], narrow)
    found = read_tensors(written(tmp_path, {"a": value}))["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [1.5, -0.25])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_cut_off(tmp_path, prefix):
    wrapped = {prefix + name: value for name, value in TENSORS.items()}
    assert set(read_tensors(written(tmp_path, wrapped))) == set(TENSORS)


def test_a_prefix_that_only_some_names_have_stays():
    some = {"module.a": 1, "b": 2}
    assert _without_prefixes(some) == some
    assert _without_prefixes({"module.a": 1, "n_averaged": 2}) == {"a": 1, "n_averaged": 2}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "model_state_dict"])
def test_state_dicts_are_found_one_level_below(key, tmp_path):
    averaged = {name: -value for name, value in TENSORS.items()}
    best = np.float32(3)  # PyTorch's own script keeps a tensor beside
    checkpoint = {"epoch": 3, "best_acc1": best, "state_dict_ema": averaged, key: TENSORS}
    assert _state_dict(checkpoint, tmp_path) == TENSORS
    assert _state_dict(TENSORS, tmp_path) == TENSORS
    assert _state_dict({"epoch": 3, "state_dict_ema": averaged}, tmp_path) == averaged


def test_what_is_no_state_dict_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no state dict.*it has epoch, optimizer$"):
        _state_dict({"epoch": 1, "optimizer": {}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no state dict.*it has nothing$"):
        _state_dict({}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth holds a list, not a state dict"):
        _state_dict([1], tmp_path / "a.pth")


def with_float8(file):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\x38")


def test_bad_files_are_refused_in_one_line(tmp_path):
    damaged, empty, strange, float8, other, folder = (
        tmp_path / name
        for name in (
            "a.safetensors",
            "b.safetensors",
            "c.safetensors",
            "d.safetensors",
            "e.npz",
            "f.pth",
        )
    )
    whole = written(tmp_path, TENSORS).read_bytes()
    damaged.write_bytes(whole[:-3])
    empty.write_bytes(b"")
    strange.write_bytes(b"no safetensors at all")
    with_float8(float8)
    other.write_bytes(b"")
    folder.mkdir()
    for file, said in (
        (damaged, r"a\.safetensors is damaged or no safetensors: "),
        (empty, r"b\.safetensors is damaged or no safetensors: "),
        (strange, r"c\.safetensors is damaged or no safetensors: "),
        (float8, r"d\.safetensors is damaged or no safetensors: "),
        (other, r"unknown suffix of a file of weights '\.npz'.*allowed: \.safetensors, \.pth"),
        (folder, r"f\.pth cannot be read: Is a directory"),
        (tmp_path / "missing.pth", r"missing\.pth cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read_tensors(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "library", "said"),
    [
        (
            "w.pth",
            "torch",
            r"w\.pth needs torch: pip install torch, or convert the file to \.safet",
        ),
        ("w.safetensors", "safetensors.numpy", r'pip install "mimicnorm-jax\[export\]"'),
    ],
)
def test_a_missing_library_is_said(tmp_path, monkeypatch, name, library, said):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=said):
        read_tensors(tmp_path / name)
