import gzip
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
        (gzip.compress(good + b"\0"), "its header says 30 bytes, 31 follow"),
        (b"not gzip", "labels.*is damaged"),
        (gzip.compress(idx_bytes(np.zeros(30), kind=13)), "not an IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0"), "not an IDX file of bytes"),
        (gzip.compress(b""), "not an IDX file of bytes"),
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
