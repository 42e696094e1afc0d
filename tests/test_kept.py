"""What is kept between starts, and when it is not used."""

import os
import time

import pytest

from mimicnorm_jax import kept
from mimicnorm_jax.data import listing, sources
from mimicnorm_jax.data.folder import FolderSource
from mimicnorm_jax.data.sources import View, channel_statistics
from tests.sources import write_folder

OLD = time.time() - 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("a")
    os.utime(path, (OLD, OLD))
    return path


def test_is_recalled_while_the_files_stay_the_same(file):
    kept.keep("x", {"a": [1, "é\udcff"]}, began=time.time() - 10, depends_on=[file])
    assert kept.recall("x") == {"a": [1, "é\udcff"]} and kept.recall("y") is None
    os.utime(file, (OLD + 1, OLD + 1))
    assert kept.recall("x") is None
    os.utime(file, (OLD, OLD))
    file.write_text("longer")
    os.utime(file, (OLD, OLD))
    assert kept.recall("x") is None
    file.unlink()
    assert kept.recall("x") is None


def test_what_is_found_at_once_is_not_kept(file):
    kept.keep("x", 1, began=time.time(), depends_on=[file])
    assert kept.recall("x") is None


def test_what_may_have_changed_meanwhile_is_not_kept(file):
    began = time.time() - 10
    for seconds in (began - 1, began + 5):
        os.utime(file, (seconds, seconds))
        kept.keep("x", 1, began=began, depends_on=[file])
        assert kept.recall("x") is None


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b no gzip", "half"])
def test_damage_is_as_if_nothing_were_there(file, cache, damage):
    kept.keep("x", list(range(1000)), began=time.time() - 10, depends_on=[file])
    (path,) = cache.glob("**/*.gz")
    path.write_bytes(path.read_bytes()[:50] if damage == "half" else damage)
    assert kept.recall("x") is None


def test_a_cache_that_cannot_be_written_is_no_error(file, cache):
    cache.write_text("a file")
    kept.keep("x", 1, began=time.time() - 10, depends_on=[file])
    assert kept.recall("x") is None


class TestUsed:
    @pytest.fixture(autouse=True)
    def _always(self, monkeypatch):
        monkeypatch.setattr(kept, "_WORTH_KEEPING", 0)
        monkeypatch.setattr(kept, "_FRESH", -1e6)

    def source(self, root):
        return FolderSource(root / "train", View(size=8, resize=8, upright=False))

    def test_a_listing_is_kept(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path / "photos")
        (root / "train" / "ant" / "notes.txt").write_text("x")
        inner = root / "train" / "bee" / "more"
        inner.mkdir()
        found, list_class = listing.list_classes(root / "train"), listing.list_class
        monkeypatch.setattr(listing, "list_class", None)
        assert listing.list_classes(root / "train") == found
        assert found.folders["ant"].left_out == {".txt": 1}
        monkeypatch.setattr(listing, "list_class", list_class)
        (inner / "new.png").write_bytes((root / "train/bee/train1_0.png").read_bytes())
        assert len(listing.list_classes(root / "train").folders["bee"].files) == 5

    def test_statistics_are_kept_with_the_images(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path / "photos")
        found = channel_statistics(self.source(root))
        sums = sources._sums
        monkeypatch.setattr(sources, "_sums", None)
        again = channel_statistics(self.source(root))
        assert [each.tolist() for each in again] == [each.tolist() for each in found]
        monkeypatch.setattr(sources, "_sums", sums)
        path = root / "train" / "ant" / "train0_0.png"
        path.write_bytes((root / "train/cat/train2_3.png").read_bytes())
        changed = channel_statistics(self.source(root))
        assert changed[0].tolist() != found[0].tolist()
