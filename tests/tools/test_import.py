"""What people have, as a build that TFDS and training read: the same bytes and labels."""

import io
import json
import re

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from mimicnorm_jax.config import default_config
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data import write as writer
from mimicnorm_jax.tools.prepare_data.__main__ import main
from mimicnorm_jax.tools.prepare_data.build import import_images
from tests import sources
from tests.sources import classes_of, examples_of, imported


def pixels_of(build, split):
    found = examples_of(build, split)
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data, _ in found]
    return np.stack(pixels), [label for _, label in found]


WRITERS = {
    "class folders": sources.write_folder,
    "parquet files": sources.write_parquet,
    "tar files": sources.write_tars,
    "tar files, json": lambda root: sources.write_tars(root, "json"),
    "tar files, folders": lambda root: sources.write_tars(root, "folders"),
}


@pytest.mark.parametrize("kind", WRITERS)
class TestEncoded:
    def test_the_same_bytes_labels_and_order(self, kind, tmp_path):
        (tmp_path / "raw").mkdir()
        build = imported(WRITERS[kind](tmp_path / "raw"), tmp_path)
        assert classes_of(build) == sources.CLASSES
        for split in sources.PER_CLASS:
            assert examples_of(build, split) == sources.in_order(split)
        assert json.loads((build / "import.json").read_text())["from"] == kind.partition(",")[0]
        assert not list(build.glob("spool"))

    def test_training_reads_it(self, kind, tmp_path):
        (tmp_path / "raw").mkdir()
        imported(WRITERS[kind](tmp_path / "raw"), tmp_path)
        data = default_config().data
        data.update(name="tfds", tfds_name="bugs", dir=str(tmp_path / "data"), image_size=8)
        train, test = open_splits(data)
        assert train.class_names == list(sources.CLASSES)
        assert train.images[:, 4, 4, 0].tolist() == [50 * label for label in train.labels]
        assert (len(train), len(test)) == (12, 6)


def test_tfds_decodes_it_by_name(tmp_path):
    imported(sources.write_folder(tmp_path / "raw"), tmp_path)
    found = tfds.data_source("bugs", split="test", data_dir=tmp_path / "data")
    assert found[5]["image"].shape == (8, 8, 3)
    assert found[5]["image"][4, 4].tolist() == [100, 10, 100]


def test_a_folder_without_splits_is_a_training_split(tmp_path, capsys):
    sources.write_folder(tmp_path, ["train"])
    report = import_images(tmp_path / "train", tmp_path / "data", name="bugs")
    assert "--config.data.test_split= --config.data.holdout=0.1" in report
    build = tmp_path / "data" / "bugs" / "1.0.0"
    assert examples_of(build, "train") == sources.in_order("train")


def test_the_folder_that_an_archive_unpacks_to(tmp_path):
    sources.write_folder(tmp_path / "raw" / "bugs2")
    (tmp_path / "raw" / ".DS_Store").write_text("")
    build = imported(tmp_path / "raw", tmp_path)
    assert examples_of(build, "test") == sources.in_order("test")


def test_a_label_for_what_has_one(tmp_path):
    with pytest.raises(UserError, match="--label=x: class folders have one label an image"):
        imported(sources.write_folder(tmp_path / "raw"), tmp_path, label="x")
    assert not (tmp_path / "data").exists()


def test_the_report_says_how_to_train_and_draws_the_classes(tmp_path):
    raw = sources.write_folder(tmp_path / "raw")
    (raw / "test").rename(raw / "val")
    report = import_images(raw, tmp_path / "data", name="bugs")
    assert "train: 12 examples, 3 classes" in report and "12 decoded" in report
    assert "--config.data.tfds_name=bugs" in report and "--config.data.test_split=val" in report
    with Image.open(tmp_path / "data/bugs/1.0.0/images_train.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    for label in range(3):  # the first of each class, drawn without distortion
        assert (50 * label, 0, 200) in colours


class TestPixels:
    def test_cifar10_in_both_forms(self, tmp_path):
        for is_binary in (True, False):
            root = tmp_path / str(is_binary)
            raw = sources.write_cifar10(root / "raw", is_binary=is_binary)
            build = imported(raw, root)
            expected = [sources.cifar(6, 10, seed) for seed in range(5)]
            pixels = np.concatenate([each for each, _ in expected])
            labels = np.concatenate([each for _, each in expected])
            order = np.argsort(labels, kind="stable")
            found = pixels_of(build, "train")
            images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(found[0], images[order])
            assert found[1] == labels[order].tolist()
            assert classes_of(build) == tuple(f"kind{index}" for index in range(10))

    @pytest.mark.parametrize("is_binary", [True, False])
    @pytest.mark.parametrize("label", ["", "coarse"])
    def test_cifar100_has_two_kinds_of_labels(self, tmp_path, is_binary, label):
        raw = sources.write_cifar100(tmp_path / "raw", is_binary=is_binary)
        build = imported(raw, tmp_path, label=label)
        _, labels = sources.cifar(8, 100, 1)
        expected = [each // 5 for each in labels] if label else labels
        assert pixels_of(build, "test")[1] == sorted(expected)
        assert len(classes_of(build)) == (20 if label else 100)

    def test_svhn_counts_zero_as_ten(self, tmp_path):
        images = sources.pixels_of(4, (32, 32, 3))
        labels = np.array([[10], [3], [1], [10]], np.uint8)
        raw = tmp_path / "raw"
        raw.mkdir()
        content = {"X": images.transpose(1, 2, 3, 0), "y": labels}
        scipy.io.savemat(raw / "train_32x32.mat", content)
        pixels, found = pixels_of(imported(raw, tmp_path), "train")
        assert found == [0, 0, 1, 3]
        np.testing.assert_array_equal(pixels, images[[0, 3, 2, 1]])

    def test_stl10_lies_on_its_side(self, tmp_path):
        raw = tmp_path / "raw" / "stl10_binary"
        raw.mkdir(parents=True)
        images = sources.pixels_of(3, (96, 96, 3))
        for split in ("train", "test"):
            (raw / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
            (raw / f"{split}_y.bin").write_bytes(bytes((10, 1, 4)))
        (raw / "class_names.txt").write_text("\n".join("abcdefghij"))
        build = imported(tmp_path / "raw", tmp_path)
        pixels, labels = pixels_of(build, "test")
        assert (labels, classes_of(build)) == ([0, 3, 9], tuple("abcdefghij"))
        np.testing.assert_array_equal(pixels, images[[1, 2, 0]])

    def test_emnists_letters_are_upright_and_count_from_zero(self, tmp_path):
        images = sources.pixels_of(2, (28, 28))
        for split in ("train", "test"):
            sources.write_idx(
                tmp_path / "raw", f"emnist-letters-{split}", images, np.array([26, 1])
            )
            sources.write_idx(tmp_path / "raw", f"emnist-digits-{split}", images, np.array([0, 1]))
        with pytest.raises(UserError, match="has several data sets: emnist-digits, emnist-letters"):
            imported(tmp_path / "raw", tmp_path)
        build = imported(tmp_path / "raw" / "emnist-letters", tmp_path)
        pixels, labels = pixels_of(build, "test")
        assert labels == [0, 25]
        np.testing.assert_array_equal(pixels, images[::-1].swapaxes(1, 2))
        assert tfds.builder_from_directory(build).info.features["image"].shape[-1] == 1


class TestInterrupted:
    @pytest.mark.parametrize("kind", ["class folders", "parquet files"])
    def test_goes_on_with_the_next_shard(self, tmp_path, monkeypatch, kind):
        raw = tmp_path / "raw"
        WRITERS[kind](raw)
        monkeypatch.setattr(writer, "_SHARD", 200)  # some shards
        whole = imported(raw, tmp_path / "whole")
        write_shard = writer._write_shard
        written = []

        def killed(records, part, path, bar):
            if len(written) == 2:
                path.with_name(f"{path.name}.part").write_bytes(b"half")
                raise KeyboardInterrupt
            written.append(path)
            write_shard(records, part, path, bar)

        monkeypatch.setattr(writer, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            imported(raw, tmp_path)
        assert not (tmp_path / "data/bugs/1.0.0").exists()
        times = [path.stat().st_mtime_ns for path in written]
        monkeypatch.setattr(writer, "_write_shard", write_shard)
        build = imported(raw, tmp_path)
        assert times == [(build / path.name).stat().st_mtime_ns for path in written]
        names = {path.name for path in whole.iterdir()}
        assert names == {path.name for path in build.iterdir()} and len(names) > 10
        for name in names:
            assert (build / name).read_bytes() == (whole / name).read_bytes(), name

    def test_starts_again_with_other_images(self, tmp_path, monkeypatch, capsys):
        raw = sources.write_folder(tmp_path / "raw")

        def killed(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "_write_description", killed)
        with pytest.raises(KeyboardInterrupt):
            imported(raw, tmp_path)
        monkeypatch.undo()
        (raw / "train/ant/train0_0.png").write_bytes(sources.encoded("test", 2, 9))
        build = imported(raw, tmp_path)
        assert "removing" in capsys.readouterr().err
        assert examples_of(build, "train")[0][0] == sources.encoded("test", 2, 9)

    def test_what_is_there_is_only_checked(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        build = imported(raw, tmp_path)
        times = {path: path.stat().st_mtime_ns for path in build.glob("*array_record*")}
        imported(raw, tmp_path)
        assert times == {path: path.stat().st_mtime_ns for path in build.glob("*array_record*")}

    def test_other_images_need_another_name(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        imported(raw, tmp_path)
        (raw / "train/ant/train0_0.png").write_bytes(sources.encoded("test", 2, 9))
        with pytest.raises(UserError, match=r"1\.0\.0 is there, and of other images"):
            imported(raw, tmp_path)


class TestRefused:
    """One clear line, exit code 2, and nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["RAW", "--name=Bugs"], "--name=Bugs is no name of a data set"),
            (["RAW"], "--name= is no name of a data set"),
            (["RAW", "--name=imagenette"], "--name=my_imagenette"),
            (["--name=bugs"], "import needs the images"),
            (["RAW/gone", "--name=bugs"], "gone does not exist: a folder of class folders"),
            (["RAW", "--name=bugs", "--sample"], "do not go with import"),
            (["RAW/train/ant", "--name=bugs"], "no images that can be imported"),
            (["--name=bugs", "--check"], "was not|has no prepared version"),
        ],
    )
    def test_wrong_arguments(self, tmp_path, capsys, arguments, message):
        raw = sources.write_folder(tmp_path / "raw")
        data = tmp_path / "data"
        given = [argument.replace("RAW", str(raw)) for argument in arguments]
        with pytest.raises(SystemExit) as caught:
            main(["import", *given, "--data-dir", str(data)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and line.startswith("error: ") and not data.exists()
        assert re.search(message, line)

    def test_classes_that_differ(self, tmp_path):
        raw = sources.write_folder(tmp_path / "raw")
        (raw / "test" / "cat").rename(raw / "test" / "cow")
        with pytest.raises(UserError, match="the classes of test and train differ: cat, cow"):
            imported(raw, tmp_path)

    def test_names_go_with_import_only(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["cifar10", "--data-dir", str(tmp_path), "--name", "x"])
        assert "go with import, not with cifar10" in capsys.readouterr().err


def test_check_finds_damage(tmp_path, capsys):
    build = imported(sources.write_folder(tmp_path / "raw"), tmp_path)
    arguments = ["import", "--data-dir", str(tmp_path / "data"), "--name", "bugs", "--check"]
    main(arguments)
    assert "test: 6 examples" in capsys.readouterr().out
    (shard,) = build.glob("*train*0000*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(SystemExit):
        main(arguments)
    line = capsys.readouterr().err
    assert str(shard) in line and "prepare_data import SOURCE --data-dir" in line
