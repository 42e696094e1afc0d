"""Imports that meet others, damage, full disks, and folders as archives leave them."""

import fcntl
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data import __main__ as program
from mimicnorm_jax.tools.prepare_data import write as writer
from mimicnorm_jax.tools.prepare_data.build import import_images
from tests import sources
from tests.sources import classes_of, examples_of, imported


def test_one_import_at_a_time(tmp_path):
    raw = sources.write_folder(tmp_path / "raw")
    directory = tmp_path / "data" / "bugs"
    running = pytest.raises(UserError, match=f"another import to {directory} is running")
    with writer.alone(directory), running:
        imported(raw, tmp_path)
    imported(raw, tmp_path)
    with (directory / ".import.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which it has given back


@pytest.mark.parametrize("damage", ["", "{", "[1]"])
def test_a_damaged_description_is_that_of_others(tmp_path, monkeypatch, damage):
    raw = sources.write_folder(tmp_path / "raw")
    draft = tmp_path / "data" / "bugs" / "incomplete.import_1.0.0"
    draft.mkdir(parents=True)
    (draft / "import.json").write_text(damage)
    build = imported(raw, tmp_path)
    assert examples_of(build, "test") == sources.in_order("test")
    (build / "import.json").write_text(damage)
    with pytest.raises(UserError, match="of other images than"):
        imported(raw, tmp_path)


def test_a_version_without_description(tmp_path):
    (tmp_path / "data/bugs/1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"1\.0\.0 is there, but not complete: remove it"):
        imported(sources.write_folder(tmp_path / "raw"), tmp_path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(writer, "_example", full)
    with pytest.raises(UserError, match=r"cannot write .*\.part: write\(\) failed: No space left"):
        imported(sources.write_folder(tmp_path / "raw"), tmp_path)


def test_a_stop_is_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "import_images", stopped)
    with pytest.raises(SystemExit) as caught:
        program.main(["import", "x", "--data-dir", str(tmp_path), "--name", "bugs"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.parametrize("damage", [b"no image", "cut"])
def test_a_damaged_image_is_named_and_may_be_repaired(tmp_path, damage):
    raw = sources.write_folder(tmp_path / "raw")
    path = raw / "train" / "bee" / "train1_2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30] if damage == "cut" else damage)
    with pytest.raises(UserError, match=f"cannot read image {path}: it (was cut off|is no image)"):
        imported(raw, tmp_path)
    assert not (tmp_path / "data/bugs/1.0.0").exists()
    path.write_bytes(whole)
    assert examples_of(imported(raw, tmp_path), "train") == sources.in_order("train")


def test_a_build_knows_the_names_of_its_images(tmp_path):
    build = imported(sources.write_folder(tmp_path / "raw"), tmp_path)
    read = tfds.builder_from_directory(build).as_data_source("test")
    assert [read[index]["file_name"].decode() for index in (0, 5)] == [
        "ant/test0_0.png",
        "cat/test2_1.png",
    ]


class TestNames:
    @pytest.mark.parametrize("name", [" ant", "ant ", "a\nb", "a\rb", "a\u2028b", "\udcff"])
    def test_that_would_not_be_the_same_again(self, name):
        with pytest.raises(UserError, match="the class name"):
            writer.check_class_names(["bee", name])

    def test_that_are_fine(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        names = ("a, b c", "é", "Z")
        for split in sources.PER_CLASS:
            for old, new in zip(sources.CLASSES, names, strict=True):
                (raw / split / old).rename(raw / split / new)
        assert classes_of(imported(raw, tmp_path)) == tuple(sorted(names))

    def test_are_looked_at_before_anything_is_written(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        for split in sources.PER_CLASS:
            (raw / split / "ant").rename(raw / split / "ant\n")
        with pytest.raises(UserError, match="a line break: rename it"):
            imported(raw, tmp_path)
        assert not (tmp_path / "data" / "bugs").exists()


class TestLayouts:
    def test_the_archive_beside_what_it_unpacked_to(self, tmp_path):
        raw = tmp_path / "raw"
        sources.write_cifar10(raw / "cifar-10-batches-py", is_binary=False)
        (raw / "cifar-10-python.tar.gz").write_bytes(b"")
        assert len(examples_of(imported(raw, tmp_path), "train")) == 30

    def test_two_folders_deep(self, tmp_path):
        sources.write_folder(tmp_path / "raw" / "data" / "bugs2")
        (tmp_path / "raw" / "data.tar.gz").write_bytes(b"")
        build = imported(tmp_path / "raw", tmp_path)
        assert examples_of(build, "test") == sources.in_order("test")

    def test_a_compressed_archive_alone(self, tmp_path):
        for name in ("x.tar.gz", "x.tgz"):
            (tmp_path / name).write_bytes(b"")
            with pytest.raises(UserError, match="is compressed; unpack it"):
                imported(tmp_path / name, tmp_path)

    def test_other_names_of_the_splits(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        (raw / "train").rename(raw / "Training")
        (raw / "test").rename(raw / "TEST")
        build = imported(raw, tmp_path)
        assert sorted(tfds.builder_from_directory(build).info.splits) == ["test", "train"]

    def test_a_test_split_alone(self, tmp_path):
        sources.write_folder(tmp_path / "raw", ["test"])
        report = import_images(tmp_path / "raw", tmp_path / "data", name="bugs")
        assert " --config.data.train_split=test --config.data.test_split= " in report

    def test_splits_by_other_names_are_no_classes(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        for split in ("train", "test"):
            (raw / split).rename(raw / f"{split}_set")
        with pytest.raises(UserError, match="has test_set, train_set: rename them to train and"):
            imported(raw, tmp_path)

    def test_a_folder_of_data_sets(self, tmp_path):
        for name in ("birds", "bugs"):
            sources.write_folder(tmp_path / "raw" / name)
        with pytest.raises(UserError, match=r"has several data sets; take one: .*birds"):
            imported(tmp_path / "raw", tmp_path)

    def test_a_single_class(self, tmp_path):
        members = [("a.png", sources.encoded("train", 0, 0)), ("a.cls", b"0")]
        sources.write_tar(tmp_path / "raw" / "train.tar", members)
        with pytest.raises(UserError, match="has a single class, 0: nothing to learn"):
            imported(tmp_path / "raw", tmp_path)

    def test_prefixes_with_blanks_and_brackets(self, tmp_path):
        images = sources.pixels_of(2, (28, 28))
        for split in ("train", "t10k"):
            sources.write_idx(tmp_path / "raw", f"my [x] v1.2-{split}", images, np.array([0, 1]))
        build = imported(tmp_path / "raw" / "my [x]", tmp_path)
        assert [label for _, label in examples_of(build, "test")] == [0, 1]


def test_of_many_classes_those_with_images_are_drawn(tmp_path):
    rows = [(sources.encoded("train", i, 0), 70_000 * i, f"{i}") for i in range(2)]
    sources.write_parquet_file(tmp_path / "raw" / "train.parquet", rows)
    build = imported(tmp_path / "raw", tmp_path)
    assert (build / "images_train.png").stat().st_size < 10_000


def test_letters_without_a_number_are_said(tmp_path):
    images = sources.pixels_of(2, (28, 28))
    sources.write_idx(tmp_path / "raw", "emnist-letters-train", images, np.array([0, 1]))
    with pytest.raises(UserError, match="has labels of -1 to 0"):
        imported(tmp_path / "raw", tmp_path)


def test_a_missing_import_is_no_data_set_of_tfds(tmp_path, capsys):
    arguments = ["import", "--data-dir", str(tmp_path), "--name", "bugs", "--check"]
    with pytest.raises(SystemExit):
        program.main(arguments)
    said = capsys.readouterr().err
    assert re.search(r"import your own images: .* import SOURCE --data-dir .* --name bugs", said)
