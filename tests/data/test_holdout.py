"""Images that are held out of training."""

import shutil

import numpy as np
import pytest

from mimicnorm_jax.data.holdout import held_out, hold_out
from mimicnorm_jax.data.sources import ArraySource, EncodedSource, View
from mimicnorm_jax.data.splits import open_splits, splits_of
from mimicnorm_jax.errors import UserError
from tests.archives import write_folders


@pytest.fixture
def numbered():
    """40 images of 3 classes, each of one grey that is its number; one class has one image."""
    labels = np.array([0] * 25 + [1] * 14 + [2])
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 2, 2, 1))
    return ArraySource(images, labels, ["a", "b", "c"])


def test_each_class_gives_its_share_and_at_least_one_and_keeps_one():
    labels = np.random.default_rng(0).permutation([0] * 100 + [1] * 30 + [2] * 3 + [3] + [4] * 2)
    for share, expected in {
        0.1: [10, 3, 1, 0, 1],
        0.001: [1, 1, 1, 0, 1],
        0.5: [50, 15, 2, 0, 1],
    }.items():
        out = held_out(labels, share, seed=0)
        assert np.bincount(labels[out], minlength=5).tolist() == expected


def test_the_seed_decides_which_and_nothing_else_does():
    labels = np.arange(60) % 3
    first = held_out(labels, 0.2, seed=1)
    np.testing.assert_array_equal(first, held_out(labels.astype(np.int64), 0.2, seed=1))
    assert np.any(first != held_out(labels, 0.2, seed=2))
    assert np.flatnonzero(first).tolist() == [17, 22, 25, 31, 34, 36, 41, 42, 48, 53, 56, 57]


def test_no_image_is_in_both_parts_and_none_is_lost(numbered):
    kept, out = hold_out(numbered, 0.2, seed=0)
    assert (len(kept), len(out)) == (32, 8)
    pixels = [*kept.images[:, 0, 0, 0], *out.images[:, 0, 0, 0]]
    assert sorted(pixels) == list(range(40))
    for part in (kept, out):
        for image, label in part:
            assert label == numbered.labels[image[0, 0, 0]]
        assert part.class_names == ["a", "b", "c"]
    identities = {numbered.identity, kept.identity, out.identity}
    identities |= {part.identity for part in hold_out(numbered, 0.2, seed=1)}
    assert len(identities) == 5


def test_files_are_held_out_as_what_is_in_memory(tmp_path, tiny_config):
    write_folders(tmp_path / "images.tar.xz")
    shutil.unpack_archive(tmp_path / "images.tar.xz", tmp_path, filter="data")
    parts = []
    for gib in (0.0, 1.0):
        config = tiny_config(
            data__name="folder", data__dir=str(tmp_path), data__cache_gib=gib, data__holdout=0.3
        )
        parts.append(splits_of(config))
    for name in ("train", "holdout"):
        lazy, cached = (getattr(splits, name) for splits in parts)
        assert lazy.identity == cached.identity and isinstance(cached, ArraySource)
        for i in range(len(cached)):
            np.testing.assert_array_equal(lazy[i][0], cached[i][0])
            assert lazy[i][1] == cached[i][1] == lazy.labels[i]
        assert str(tmp_path) in lazy.describe(0)


class Records(EncodedSource):
    """Of which nobody knows the labels until they are read."""

    identity = "records"

    def __init__(self):
        super().__init__(["a", "b"], View(size=2, resize=2, upright=True))

    def __len__(self):
        return 10

    def read(self, index):
        return self.describe(index).encode(), index % 2

    def describe(self, index):
        return f"record {index}"


def test_labels_that_are_beside_the_images_alone_are_read():
    kept, out = hold_out(Records(), 0.4, seed=0)
    assert np.bincount(out.labels).tolist() == [2, 2]
    assert np.bincount(kept.labels).tolist() == [3, 3]
    for part in (kept, out):
        for i in range(len(part)):
            assert part.read(i) == (part.describe(i).encode(), part.labels[i])


def test_without_a_share_the_splits_are_whole(tiny_config):
    config = tiny_config()
    splits = splits_of(config)
    assert splits.holdout is None
    assert len(splits.train) == len(open_splits(config.data)[0])


def test_where_nothing_can_be_held_out_it_is_said(tiny_config, monkeypatch):
    config = tiny_config(data__holdout=0.1)
    single = ArraySource(np.zeros((3, 8, 8, 1), np.uint8), np.arange(3), ["a", "b", "c"])
    monkeypatch.setattr("mimicnorm_jax.data.splits.open_splits", lambda data: (single, single))
    with pytest.raises(UserError, match=r"config.data.holdout = 0.1: no class has more than one"):
        splits_of(config)
