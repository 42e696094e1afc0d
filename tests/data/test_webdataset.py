"""Tar files as WebDataset writes them, read where they lie."""

import pickle
import tarfile

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


class TestDamage:
    """tarfile ends its list at a damaged header, as if there were no more."""

    @pytest.fixture
    def path(self, tmp_path):
        members = [(f"{name}/{index}.png", ONE) for name in "ab" for index in range(9)]
        sources.write_tar(tmp_path / "train.tar", members)
        return tmp_path / "train.tar"

    def test_a_damaged_header(self, path):
        content = bytearray(path.read_bytes())
        at = content.index(b"b/3.png")
        content[at + 148] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"is damaged at byte {at}"):
            read_tars(path.parent, VIEW)

    def test_cut_off_in_a_header_or_an_image(self, path):
        content = path.read_bytes()
        at = content.index(b"b/3.png")
        for end in (at + 100, at + 512 + 20):
            path.write_bytes(content[:end])
            with pytest.raises(UserError, match="is damaged"):
                read_tars(path.parent, VIEW)

    def test_two_files_one_after_the_other(self, path):
        path.write_bytes(path.read_bytes() * 2)
        with pytest.raises(UserError, match="or it is several tar files one after the other"):
            read_tars(path.parent, VIEW)


def test_links_are_followed_or_counted(tmp_path, capsys):
    path = tmp_path / "train.tar"
    sources.write_tar(path, [("a/1.png", ONE), ("b/1.png", TWO)])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("b/2.png", tarfile.LNKTYPE, "a/1.png"),
            ("b/3.png", tarfile.SYMTYPE, "1.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    source = read_tars(tmp_path, VIEW)["train"]
    assert [source.read(index) for index in range(3)] == [(ONE, 0), (TWO, 1), (ONE, 1)]
    assert "links (1)" in capsys.readouterr().err


def test_a_class_is_the_first_folder_below_the_split_or_what_all_share(tmp_path):
    tiny = [(f"tiny/train/n{c}/images/n{c}_{i}.png", ONE) for c in range(3) for i in range(2)]
    sources.write_tar(tmp_path / "a.tar", tiny)
    assert read_tars(tmp_path / "a.tar", VIEW)["train"].class_names == ["n0", "n1", "n2"]
    inner = [(f"./photos/{c}/more/{c}.png", ONE) for c in "xy"]
    hidden = [("photos/@eaDir/x.png", ONE), ("photos/x/._x.png", ONE)]
    sources.write_tar(tmp_path / "b.tar", inner + hidden)
    found = read_tars(tmp_path / "b.tar", VIEW)["train"]
    assert (found.class_names, len(found)) == (["x", "y"], 2)


@pytest.mark.parametrize("names", [("train/shards/0", "val/shards/0"), ("x-TRAIN-0", "x-val-0")])
def test_splits_are_known_by_any_folder_or_word(tmp_path, names):
    for name in names:
        sources.write_tar(tmp_path / f"{name}.tar", [("a/1.png", ONE), ("b/1.png", TWO)])
    assert sorted(read_tars(tmp_path, VIEW)) == ["train", "val"]
    sources.write_tar(tmp_path / "extra.tar", [("a/1.png", ONE), ("b/1.png", TWO)])
    with pytest.raises(UserError, match=r"extra\.tar tells no split, and other tar files do"):
        read_tars(tmp_path, VIEW)


def test_folders_are_no_labels_where_others_have_some(tmp_path):
    sources.write_tar(tmp_path / "0.tar", [("x/a.png", ONE), ("x/a.cls", b"cat")])
    sources.write_tar(tmp_path / "1.tar", [("x/b.png", TWO)])
    with pytest.raises(UserError, match=r"1\.tar: x/b\.png has no class"):
        read_tars(tmp_path, VIEW)
    members = [("x/b.png", TWO), ("x/b.json", b'{"class": 1, "id": 2}')]
    sources.write_tar(tmp_path / "0.tar", members)
    sources.write_tar(tmp_path / "1.tar", [("y/b.png", TWO)])
    with pytest.raises(UserError, match=r"no \.json .* has a label in .label.; there are cl"):
        read_tars(tmp_path, VIEW)


def test_secret_labels_and_single_classes(tmp_path, capsys):
    root = sources.write_tars(tmp_path / "a")
    secret = [("a.png", ONE), ("a.cls", b"-1")]
    for path in root.glob("*test*"):
        sources.write_tar(path, secret)
    assert sorted(read_tars(root, VIEW)) == ["train"]
    assert "split test has no labels: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"'test'.*--config\.data\.test_split= --config"):
        opened(root)
    train, test = opened(root, test_split="", holdout=0.2)
    assert len(train) == 12 and test is None
    sources.write_tar(tmp_path / "b" / "train.tar", [("a.png", ONE), ("a.cls", b"0")])
    with pytest.raises(UserError, match="has a single class, 0: nothing to learn"):
        opened(tmp_path / "b", test_split="", holdout=0.2)


@pytest.mark.parametrize(
    ("content", "message"),
    [("ant\nbee\ncat".encode("utf-16"), "is no text in UTF-8"), (b"\xef\xbb\xbfant\nbee\ncat", "")],
)
def test_names_of_classes_in_other_encodings(tmp_path, content, message):
    root = sources.write_tars(tmp_path)
    (root / "classes.txt").write_bytes(content)
    if not message:
        assert read_tars(root, VIEW)["train"].class_names == list(sources.CLASSES)
        return
    with pytest.raises(UserError, match=message):
        read_tars(root, VIEW)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", ONE), ("a.json", b"[" * 20_000)], "is damaged"),
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
