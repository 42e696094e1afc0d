import gzip
import os
import struct

import numpy as np
import pytest

from mimicnorm_jax.config import default_config, validate
from mimicnorm_jax.data.idx import read_idx
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError


def idx_bytes(array, kind=8):
    header = bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 12)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path


def data_config(root, **values):
    config = default_config()
    config.data.update({"name": "idx", "dir": str(root), "image_size": 28} | values)
    validate(config)
    return config.data


def test_the_published_files_are_read_as_they_are(mnist):
    train, test = open_splits(data_config(mnist))
    assert (len(train), len(test)) == (30, 12)
    assert train.image_shape == (28, 28, 1) and train.class_names == [str(i) for i in range(10)]
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    np.testing.assert_array_equal(train.images[..., 0], expected)
    np.testing.assert_array_equal(test.labels, np.arange(12) % 10)
    assert train.identity != test.identity
    for path in mnist.glob("*.gz"):  # unpacked, they are the same
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert open_splits(data_config(mnist))[0].identity == train.identity


def test_images_are_resized(mnist):
    assert open_splits(data_config(mnist, image_size=32))[0].image_shape == (32, 32, 1)


def test_what_is_wrong_with_a_file_is_said(mnist):
    labels, images = (mnist / f"train-{kind}-ubyte.gz" for kind in ("labels-idx1", "images-idx3"))
    good = gzip.decompress(labels.read_bytes())
    for content, message in (
        (gzip.compress(good)[:-10], "labels.*is damaged"),
        (gzip.compress(good[:-1]), "its header says 30 bytes, 29 follow"),
        (gzip.compress(good + b"\0"), "its header says 30 bytes, more follow"),
        (b"not gzip", "labels.*is damaged"),
        (gzip.compress(idx_bytes(np.zeros(30), kind=13)), "not an IDX file of bytes or whole"),
        (gzip.compress(b"\0\0\x08\x03\0"), "not an IDX file of bytes or whole"),
        (gzip.compress(b""), "not an IDX file of bytes or whole"),
        (gzip.compress(idx_bytes(np.zeros(29))), "do not belong together"),
        (gzip.compress(b"\0\0\x08\x03" + b"\x80\0\0\0" * 3), "its header says 9903520314283042199"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_splits(data_config(mnist))
    labels.unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        open_splits(data_config(mnist))
    assert read_idx(images).shape == (30, 28, 28)


def write_emnist(root, kind="letters"):
    """A letter that is dark at the top, as EMNIST stores it: on its side."""
    upright = np.zeros((52, 28, 28), np.uint8)
    upright[:, :4] = 200
    for split in ("train", "test"):
        prefix = root / f"emnist-{kind}-{split}"
        labels = np.arange(52) % 26 + 1
        for name, array in (("images-idx3", upright.swapaxes(1, 2)), ("labels-idx1", labels)):
            path = prefix.with_name(f"{prefix.name}-{name}-ubyte.gz")
            path.write_bytes(gzip.compress(idx_bytes(array)))
    rows = (f"{number} {64 + number} {96 + number}\n" for number in range(1, 27))
    (root / f"emnist-{kind}-mapping.txt").write_text("".join(rows))
    return {"train_split": f"emnist-{kind}-train", "test_split": f"emnist-{kind}-test"}


def test_emnist_is_turned_upright_and_its_letters_count_from_0(tmp_path, capsys):
    splits = write_emnist(tmp_path)
    train, test = open_splits(data_config(tmp_path, **splits))
    assert np.all(train.images[:, :4] == 200) and np.all(train.images[:, 4:] == 0)
    assert train.class_names == [chr(code) for code in range(65, 91)] == test.class_names
    assert np.bincount(train.labels).tolist() == [2] * 26
    assert "emnist-letters-train are turned upright" in capsys.readouterr().err
    (tmp_path / "emnist-letters-mapping.txt").unlink()
    train, _ = open_splits(data_config(tmp_path, **splits))
    assert train.class_names == [str(number) for number in range(26)]
    with pytest.raises(
        UserError, match=r"there are files of emnist-letters-test, emnist-letters-t"
    ):
        open_splits(data_config(tmp_path))


def test_qmnists_labels_are_the_first_column_of_its_table(mnist):
    table = np.zeros((30, 8), ">i4")
    table[:, 0] = np.arange(30) % 10
    table[:, 1:] = 70_000
    header = bytes((0, 0, 12, 2)) + struct.pack(">2I", 30, 8)
    for name in ("train", "test"):
        images = (mnist / "train-images-idx3-ubyte.gz").read_bytes()
        (mnist / f"qmnist-{name}-images-idx3-ubyte.gz").write_bytes(images)
        labels = gzip.compress(header + table.tobytes())
        (mnist / f"qmnist-{name}-labels-idx2-int.gz").write_bytes(labels)
    splits = {"train_split": "qmnist-train", "test_split": "qmnist-test"}
    train, _ = open_splits(data_config(mnist, **splits))
    np.testing.assert_array_equal(train.labels, np.arange(30) % 10)
    assert train.class_names == [str(i) for i in range(10)]


def test_no_more_is_unpacked_than_the_header_announces(mnist, monkeypatch):
    path = mnist / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(30)) + bytes(1000)))
    counts = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda self, size=-1: counts.append(size) or read(self, size)
    )
    with pytest.raises(UserError, match="its header says 30 bytes, more follow"):
        read_idx(path)
    assert min(counts) > 0 and sum(counts) == 4 + 4 + 30 + 1


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe-images-idx3-ubyte")
    with pytest.raises(UserError, match="is no regular file"):
        read_idx(tmp_path / "pipe-images-idx3-ubyte")


@pytest.mark.parametrize("shape", [(0, 28, 28), (30, 0, 0)])
def test_no_images_are_no_data_set(mnist, shape):
    images, labels = (mnist / f"train-{k}-ubyte.gz" for k in ("images-idx3", "labels-idx1"))
    images.write_bytes(gzip.compress(idx_bytes(np.zeros(shape))))
    labels.write_bytes(gzip.compress(idx_bytes(np.zeros(shape[0]))))
    with pytest.raises(UserError, match="do not belong together"):
        open_splits(data_config(mnist))


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere' is not a folder"):
        open_splits(data_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.data\.dir is not set"):
        data_config("")
