"""Tar files as WebDataset writes them, read where they lie."""

import pickle

import pytest

from mimicnorm_jax import kept
from mimicnorm_jax.config import default_config, validate
from mimicnorm_jax.data import tar_index
from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.data.webdataset import read_tars
from mimicnorm_jax.errors import UserError
from tests import sources

VIEW = View(size=8, resize=8, upright=False)
ONE, TWO = sources.encoded("train", 0, 0), sources.encoded("train", 1, 0)


def opened(root, **values):
    config = default_config()
    config.data.update(name="webdataset", dir=str(root), image_size=8, **values)
    validate(config)
    return open_splits(config.data)


@pytest.mark.parametrize("label", ["cls", "json", "folders"])
def test_the_images_are_read_in_the_order_of_every_import(tmp_path, label):
    root = sources.write_tars(tmp_path, label)
    for split, source in read_tars(root, VIEW).items():
        assert [source.read(index) for index in range(len(source))] == sources.in_order(split)
        assert source.class_names == list(sources.CLASSES)


def test_training_reads_them(tmp_path):
    train, test = opened(sources.write_tars(tmp_path))
    assert train.images[:, 4, 4, 0].tolist() == [50 * label for label in train.labels]
    assert (len(train), len(test)) == (12, 6) and train.identity != test.identity


def test_another_usual_name_of_a_split_is_said(tmp_path, capsys):
    for path in sources.write_tars(tmp_path).glob("bugs-test-*.tar"):
        path.rename(path.with_name(path.name.replace("test", "validation")))
    _, test = opened(tmp_path)
    assert len(test) == 6 and "validation for test" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown split of .* 'exam'"):
        opened(tmp_path, test_split="exam")


def test_the_folder_may_name_the_split(tmp_path):
    for split in ("train", "val"):
        sources.write_tar(tmp_path / split / "0000.tar", [("a.png", ONE), ("a.cls", b"0")])
    assert sorted(read_tars(tmp_path, VIEW)) == ["train", "val"]


def test_without_names_classes_are_numbers_of_one_length(tmp_path):
    members = [("a.png", ONE), ("a.cls", b"10\n"), ("b.png", TWO), ("b.cls", b"2")]
    sources.write_tar(tmp_path / "train.tar", members)
    found = read_tars(tmp_path, VIEW)["train"]
    assert found.class_names == [f"{number:02}" for number in range(11)]
    assert found.labels.tolist() == [2, 10]


def test_another_field_of_the_json(tmp_path):
    members = [("a.png", ONE), ("a.json", b'{"kind": "moth"}')]
    members += [("b.png", TWO), ("b.json", b'{"kind": "ant"}')]
    sources.write_tar(tmp_path / "train.tar", members)
    assert read_tars(tmp_path, VIEW, "kind")["train"].class_names == ["ant", "moth"]


def test_workers_read_a_copy(tmp_path):
    source = read_tars(sources.write_tars(tmp_path), VIEW)["train"]
    source.read(0)
    assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)


def test_dots_in_names_are_part_of_the_key(tmp_path, capsys):
    members = [("a.v2.png", ONE), ("a.cls", b"0"), ("b.png", TWO), ("b.cls", b"1"), ("b.txt", b"")]
    sources.write_tar(tmp_path / "train.tar", members)
    assert read_tars(tmp_path, VIEW)["train"].labels.tolist() == [0, 1]
    assert "left out" in (said := capsys.readouterr().err) and ".txt (1)" in said
    members = [("x/a.1.png", ONE), ("x/a.2.png", ONE), ("y/a.png", TWO)]
    sources.write_tar(tmp_path / "train.tar", members)
    assert read_tars(tmp_path, VIEW)["train"].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.png", ONE), ("a.jpg", ONE), ("a.cls", b"0")],
            "has 2 images of a: it is not clear which",
        ),
        ([("a.png", ONE), ("b.cls", b"0")], r"a\.png has no class: no \.cls, no 'label' in its"),
        ([("a.png", ONE)], r"a\.png has no class"),
        ([("a.png", ONE), ("a.json", b"{")], "is damaged: Expecting property name"),
        ([("a.png", ONE), ("a.cls", b"0"), ("b.png", TWO), ("b.cls", b"x")], "numbers for some"),
        ([("a.txt", b"x")], "have no images"),
        ([("n01440764.tar", b"x")], "1 tar files in it; if it is ImageNet's own"),
        ([("a.png", ONE), ("a.cls", b"9999999")], "that many classes there are not"),
    ],
)
def test_is_refused(tmp_path, members, message):
    sources.write_tar(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=message):
        read_tars(tmp_path, VIEW)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no \.tar files"):
        opened(tmp_path)
    (tmp_path / "train.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.tar\.gz is compressed; unpack it"):
        opened(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"train\.tar is damaged"):
        opened(tmp_path)
    with pytest.raises(UserError, match="gone' does not exist"):
        opened(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds the \.tar files"):
        opened("")


def test_a_file_that_was_cut_off_is_said(tmp_path):
    root = sources.write_tars(tmp_path)
    source = read_tars(root, VIEW)["train"]
    for path in root.glob("*train*.tar"):
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cannot read image .* of .*tar: the tar file ends before"):
        [source[index] for index in range(len(source))]


def test_labels_beyond_the_names(tmp_path):
    root = sources.write_tars(tmp_path)
    (root / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="has 2 different names; the labels go to 2"):
        read_tars(root, VIEW)


def test_an_index_is_kept_while_the_file_stays_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(kept, "_FRESH", -1e6)
    root = sources.write_tars(tmp_path / "tars")
    found = read_tars(root, VIEW)["train"]
    read_headers = tar_index._read_headers
    monkeypatch.setattr(tar_index, "_read_headers", None)
    again = read_tars(root, VIEW)["train"]
    assert again.identity == found.identity and again.read(5) == found.read(5)
    monkeypatch.setattr(tar_index, "_read_headers", read_headers)
    path = root / "bugs-train-000.tar"
    sources.write_tar(path, [("new.png", ONE), ("new.cls", b"2")])
    assert len(read_tars(root, VIEW)["train"]) == 7
