"""Folders as people have them: what is found in them, what is left out, and what is said."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.config import default_config
from mimicnorm_jax.data.splits import has_test_split, open_splits
from mimicnorm_jax.errors import UserError


def write(path, value=100, blue=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "jpeg", ".tif": "tiff"}.get(path.suffix, path.suffix[1:] or "png")
    Image.new("RGB", (8, 8), (value, 0, blue)).save(path, kind)


def write_splits(root, names=("train", "test"), classes=("cat", "dog"), below=""):
    for blue, split in enumerate(names):
        for label, name in enumerate(classes):
            for index in range(3):
                write(root / split / name / below / f"{index}.png", 50 + 100 * label, blue)


def opened(root, **values):
    data = default_config().data
    data.update(name="folder", dir=str(root), image_size=8, **values)
    return open_splits(data)


def is_right(train, classes=("cat", "dog"), per_class=3):
    assert train.class_names == list(classes)
    assert np.bincount(train.labels).tolist() == [per_class] * len(classes)
    for index in range(len(train)):
        image, label = train[index]
        assert image[0, 0, 0] == 50 + 100 * label
    return True


@pytest.mark.parametrize("found", ["val", "valid", "validation", "Test", "testing"])
@pytest.mark.parametrize("asked", ["test", "validation"])
def test_a_test_split_of_another_usual_name_is_found_and_said(found, asked, tmp_path, capsys):
    write_splits(tmp_path, ("train", found))
    train, test = opened(tmp_path, test_split=asked)
    assert is_right(train) and is_right(test)
    said = capsys.readouterr().err
    assert (f"NOTE: in {tmp_path}, {found} for {asked}\n" in said) == (found != asked)


def test_of_several_the_configured_one_counts_and_then_its_like(tmp_path, capsys):
    write_splits(tmp_path, ("train", "val", "test"))
    write(tmp_path / "val" / "cat" / "3.png", 50)
    assert len(opened(tmp_path)[1]) == 6
    assert "NOTE" not in capsys.readouterr().err
    assert len(opened(tmp_path, test_split="validation")[1]) == 7
    assert "val for validation" in capsys.readouterr().err


def test_training_images_of_another_usual_name(tmp_path, capsys):
    write_splits(tmp_path, ("Training", "Testing"))
    train, test = opened(tmp_path)
    assert is_right(train) and is_right(test)
    assert "Training for train and Testing for test" in capsys.readouterr().err


def test_a_name_that_somebody_thought_of_has_no_other(tmp_path):
    write_splits(tmp_path)
    with pytest.raises(UserError, match="has no folder held_out"):
        opened(tmp_path, test_split="held_out")
    with pytest.raises(UserError, match="has no folder first"):
        opened(tmp_path, train_split="first")


def test_classes_without_splits_take_images_held_out(tmp_path, capsys):
    write_splits(tmp_path, ("",))
    with pytest.raises(UserError, match=r"neither train nor test: .*holdout=0\.1"):
        opened(tmp_path)
    train, test = opened(tmp_path, holdout=0.34)
    assert is_right(train) and test is None
    assert "its folders are taken as classes" in capsys.readouterr().err
    data = default_config().data
    data.update(name="folder", dir=str(tmp_path), holdout=0.34)
    assert not has_test_split(data)


def test_classes_may_be_named_like_splits(tmp_path):
    """Trains are photographed often."""
    write_splits(tmp_path / "a", ("",), ("bus", "train"))
    assert is_right(opened(tmp_path / "a", holdout=0.34)[0], ("bus", "train"))
    write_splits(tmp_path / "b", classes=("bus", "train"))
    train, test = opened(tmp_path / "b")
    assert is_right(train, ("bus", "train")) and is_right(test, ("bus", "train"))


def test_a_folder_too_deep_or_too_high_is_hinted_at(tmp_path):
    write_splits(tmp_path / "set")
    with pytest.raises(UserError, match=rf"are training images; .*data.dir={tmp_path}/set"):
        opened(tmp_path / "set" / "train")
    with pytest.raises(UserError, match=rf"has no train; .*--config.data.dir={tmp_path}/set"):
        opened(tmp_path)
    write_splits(tmp_path / "pets" / "images", ("",))
    with pytest.raises(UserError, match=rf"one folder, images; .*dir={tmp_path}/pets/images"):
        opened(tmp_path / "pets", holdout=0.1)


def test_images_below_their_class(tmp_path):
    write_splits(tmp_path, below="images")
    assert is_right(opened(tmp_path)[0])


def test_what_systems_leave_is_no_class_and_no_image(tmp_path, capsys):
    write_splits(tmp_path)
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN"):
        write(tmp_path / "train" / name / "0.png")
        write(tmp_path / "train" / "cat" / name / "0.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"metadata")
    assert is_right(opened(tmp_path)[0])
    assert "NOTE" not in capsys.readouterr().err


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    write_splits(tmp_path)
    for name in ("a.heic", "b.HEIC", "notes.txt", "README"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"something")
    (tmp_path / "train" / "cat" / "dead.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    write(tmp_path / "train" / "stray.png")
    assert is_right(opened(tmp_path)[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"NOTE: left out in {tmp_path}/train: .heic (2), ")
    for said in (".txt (1)", "no suffix (1)", "broken links (1)", "no regular files (1)"):
        assert said in line
    assert "in no class folder (1)" in line


def test_a_class_that_would_lose_all_is_an_error(tmp_path):
    write_splits(tmp_path)
    for index in range(3):
        path = tmp_path / "train" / "dog" / f"{index}.png"
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"dog has no image that can be read, but \.heic \(3\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "suffix", [".jpg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".JPEG", ".jfif"]
)
def test_images_of_every_kind(suffix, tmp_path):
    write_splits(tmp_path)
    path = tmp_path / "train" / "cat" / f"9{suffix}"
    kind = {".jpg": "jpeg", ".jfif": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:].lower())
    Image.new("RGB", (8, 8), (50, 0, 0)).save(path, kind, **LOSSLESS.get(kind, {}))
    train = opened(tmp_path)[0]
    assert len(train) == 7 and abs(int(train[3][0][0, 0, 0]) - 50) < 3


LOSSLESS = {"jpeg": {"quality": 100}, "webp": {"lossless": True}}


def test_content_counts_where_the_suffix_lies_or_is_missing(tmp_path):
    write_splits(tmp_path)
    for index, kind in enumerate(("webp", "png")):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (50, 0, 0)).save(content, kind, **LOSSLESS.get(kind, {}))
        (tmp_path / "train" / "cat" / f"8{index}.jpg").write_bytes(content.getvalue())
        (tmp_path / "train" / "cat" / f"9{index}").write_bytes(content.getvalue())
    train = opened(tmp_path)[0]
    assert np.bincount(train.labels).tolist() == [7, 3]
    assert all(abs(int(train[index][0][0, 0, 0]) - 50) < 3 for index in range(7))


def test_links_are_followed_and_those_that_lead_nowhere_are_named(tmp_path):
    write_splits(tmp_path)
    shutil.move(tmp_path / "train" / "dog", tmp_path / "elsewhere")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    assert is_right(opened(tmp_path)[0])
    (tmp_path / "train" / "emu").symlink_to("nowhere")
    with pytest.raises(UserError, match="train/emu is a link to nowhere, which is not there"):
        opened(tmp_path)
    (tmp_path / "train" / "emu").unlink()
    (tmp_path / "train" / "emu").symlink_to("emu")
    with pytest.raises(UserError, match="train/emu is a link to itself"):
        opened(tmp_path)
    (tmp_path / "train" / "emu").unlink()
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(UserError, match="again is a link to a folder that it is in"):
        opened(tmp_path)


@pytest.mark.parametrize("cache_gib", [0.0, 2.0])
def test_training_images_in_the_test_split_are_warned_of(cache_gib, tmp_path, capsys):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(20):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index:02}.png")
    opened(tmp_path, cache_gib=cache_gib)
    assert "WARNING" not in capsys.readouterr().err
    for index in range(3):
        there = tmp_path / "train" / "dog" / f"{index:02}.png"
        shutil.copy(there, tmp_path / "test" / "dog" / there.name)
    opened(tmp_path, cache_gib=cache_gib)
    assert "WARNING: 3 of 40 test images" in capsys.readouterr().err
    opened(tmp_path, cache_gib=cache_gib, test_split="train")
    assert "WARNING: all 40 test images" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "test")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    opened(tmp_path, cache_gib=cache_gib)
    assert "WARNING: all 40 test images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train-00000-of-00001.parquet", r"prepare_data import .* --data-dir data --name NAME"),
        ("train-000.tar", "--config.data.name=webdataset"),
        ("data_batch_1", r"has CIFAR-10's files; .* import .* --data-dir data --name NAME"),
        ("train_32x32.mat", "has SVHN's files; .* import"),
        ("train_X.bin", "has STL-10's files; .* import"),
        ("train-images-idx3-ubyte.gz", "--config.data.name=idx"),
    ],
)
def test_other_formats_are_pointed_at_what_reads_them(tmp_path, name, hint):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"")
    with pytest.raises(UserError, match=hint):
        opened(tmp_path)


def test_a_table_beside_one_folder_of_images_is_pointed_at(tmp_path):
    for index in range(2):
        write(tmp_path / "images" / f"{index}.png")
    (tmp_path / "labels.csv").write_text("id,breed\n0,pug\n1,boxer\n")
    with pytest.raises(UserError, match=r"--config\.data\.labels_file=labels\.csv"):
        opened(tmp_path, holdout=0.5)
