"""CIFAR's pickles are followed, not run."""

import io
import pickle

import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data.cifar import read_pickle
from tests import sources
from tests.sources import imported


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_protocol(tmp_path, protocol):
    batch = {
        "labels": [1, 2, 300],
        "data": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "s": "x",
    }
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    found = read_pickle(tmp_path / "batch")
    np.testing.assert_array_equal(found.pop("data"), batch["data"])
    assert found == {"labels": [1, 2, 300], "s": "x"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": np.zeros(2)}, "an array that is not of uint8"),
        ({"a": io.StringIO}, "it names _io.StringIO"),
        ({"a": complex(1, 2)}, "it names builtins.complex"),
        ({"a": [[1]]}, "it has a list where"),
        ({"a": (1, 2)}, "it has a tuple where"),
        ([1], "it is no dictionary"),
    ],
)
def test_anything_else_is_refused(tmp_path, value, message):
    (tmp_path / "batch").write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises(UserError, match=message):
        read_pickle(tmp_path / "batch")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"(ios\nsystem\n.", "the instruction INST, which no batch of CIFAR has"),
        (b"N" * 100_000 + b"(l" * 100_000 + b".", "is damaged: it is no dictionary"),
        (b"t.", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_other_programs(tmp_path, program, message):
    (tmp_path / "batch").write_bytes(program)
    with pytest.raises(UserError, match=message):
        read_pickle(tmp_path / "batch")


@pytest.mark.parametrize("labels", [[], [10**30], [True], [0.5], [-1], [11]])
def test_labels_that_are_none(tmp_path, labels):
    raw = sources.write_cifar10(tmp_path / "raw", is_binary=False)
    batch = {"labels": labels, "data": np.zeros((len(labels), 3072), np.uint8)}
    (raw / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(
        UserError, match=r"test_batch is no batch of CIFAR|which no batch|labels go to 11"
    ):
        imported(raw, tmp_path)


def test_nothing_of_it_is_called(tmp_path):
    called = []
    globals()["_seen"] = called.append
    (tmp_path / "batch").write_bytes(f"c{__name__}\n_seen\n(I1\ntR.".encode())
    with pytest.raises(UserError, match=r"it names .*_seen"):
        read_pickle(tmp_path / "batch")
    assert not called


def test_a_half_is_damaged(tmp_path):
    raw = sources.write_cifar10(tmp_path / "raw", is_binary=False)
    path = raw / "data_batch_3"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        imported(raw, tmp_path)
