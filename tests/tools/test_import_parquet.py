"""Images in parquet files, as Hugging Face's data sets come."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from mimicnorm_jax.errors import UserError
from tests import sources
from tests.sources import classes_of, examples_of, imported


def rows_of(count, labels=None):
    labels = range(count) if labels is None else labels
    return [(sources.encoded("train", 0, i), label, f"{i}.png") for i, label in enumerate(labels)]


def test_without_metadata_labels_are_numbers(tmp_path):
    sources.write_parquet_file(tmp_path / "raw" / "some.parquet", rows_of(2, [11, 0]))
    build = imported(tmp_path / "raw", tmp_path)
    assert classes_of(build) == tuple(f"{number:02}" for number in range(12))


def test_a_damaged_image_is_named_before_anything_is_there(tmp_path):
    path = tmp_path / "raw" / "some.parquet"
    sources.write_parquet_file(path, [(b"a", 0, "x"), *rows_of(1, [1])])
    with pytest.raises(UserError, match=f"{path} row 0: it is no image of a kind that is read"):
        imported(tmp_path / "raw", tmp_path)
    assert not (tmp_path / "data/bugs/1.0.0").exists()
    sources.write_parquet_file(path, rows_of(2))
    imported(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("name", ["default/partial-{}/0000", "{}/shards/0000", "bugs-{}-0-of-1"])
def test_splits_are_known_by_any_folder_or_word(tmp_path, name):
    for split in ("train", "Testing"):
        rows = rows_of(2)[: 2 if split == "train" else 1] * 2
        sources.write_parquet_file(tmp_path / "raw" / f"{name.format(split)}.parquet", rows)
    splits = tfds.builder_from_directory(imported(tmp_path / "raw", tmp_path)).info.splits
    assert {split: info.num_examples for split, info in splits.items()} == {"train": 4, "test": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train-0", "extra-0"), r"extra-0\.parquet tells no split, and other files do"),
        (("red/train/0000", "blue/train/0000"), "both have parquet files of one split"),
    ],
)
def test_files_whose_split_is_not_clear(tmp_path, names, message):
    for name in names:
        sources.write_parquet_file(tmp_path / "raw" / f"{name}.parquet", rows_of(2))
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "raw", tmp_path)


def test_files_of_other_columns(tmp_path):
    sources.write_parquet_file(tmp_path / "raw" / "train-0.parquet", rows_of(2))
    names = ("img", "class")
    sources.write_parquet_file(tmp_path / "raw" / "train-1.parquet", rows_of(2), names=names)
    with pytest.raises(UserError, match=r"train-0\.parquet and .*train-1\.parquet have other col"):
        imported(tmp_path / "raw", tmp_path)


def test_other_images_of_the_same_size_are_others(tmp_path):
    path = tmp_path / "raw" / "train.parquet"
    sources.write_parquet_file(path, rows_of(2))
    imported(tmp_path / "raw", tmp_path)
    content = path.read_bytes()
    changed = content.replace(sources.encoded("train", 0, 1)[-20:], bytes(20))
    assert len(changed) == len(content) and changed != content
    path.write_bytes(changed)
    with pytest.raises(UserError, match="of other images"):
        imported(tmp_path / "raw", tmp_path)


def test_images_without_names_keep_their_order(tmp_path):
    images = [{"bytes": sources.encoded("train", 0, i)} for i in range(3)]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": images, "label": [1, 0, 1]}), tmp_path / "raw/train.parquet")
    found = examples_of(imported(tmp_path / "raw", tmp_path), "train")
    assert found == [(images[1]["bytes"], 0), (images[0]["bytes"], 1), (images[2]["bytes"], 1)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"labels": [[0], [1, 2]]}, r"row 0 has no label, but \[0\] in column 'labels'"),
        ({"label": [0.5, 1.0]}, "row 0 has no label, but 0.5"),
        ({"label": [0, 10**17]}, "row 1 has a label that is 1"),
    ],
)
def test_labels_that_are_none(tmp_path, column, message):
    images = [{"bytes": sources.encoded("train", 0, i), "path": "x"} for i in range(2)]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": images} | column), tmp_path / "raw/train.parquet")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "raw", tmp_path)


def test_a_row_of_nothing(tmp_path):
    images = [{"bytes": sources.encoded("train", 0, 0), "path": "x"}, None]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "raw/train.parquet")
    with pytest.raises(UserError, match="row 1 has no image in it"):
        imported(tmp_path / "raw", tmp_path)


def test_text_labels_are_names(tmp_path):
    rows = [(sources.encoded("train", 0, i), name, f"{i}") for i, name in enumerate("baab")]
    sources.write_parquet_file(tmp_path / "raw" / "train.parquet", rows)
    build = imported(tmp_path / "raw", tmp_path)
    assert (classes_of(build), [label for _, label in examples_of(build, "train")]) == (
        ("a", "b"),
        [0, 0, 1, 1],
    )


def test_a_split_of_secret_labels_is_left_out(tmp_path, capsys):
    raw = sources.write_parquet(tmp_path / "raw")
    secret = [(sources.encoded("test", 0, 0), -1, "x.png")]
    for path in (raw / "data").glob("test*"):
        sources.write_parquet_file(path, secret, sources.HUGGING_FACE)
    build = imported(raw, tmp_path)
    assert "split test has no labels: left out" in capsys.readouterr().err
    assert list(tfds.builder_from_directory(build).info.splits) == ["train"]


def test_the_order_of_the_classes_is_that_of_the_metadata(tmp_path):
    names = ["tench", "goldfish"]  # ImageNet's are not sorted by name
    features = sources.HUGGING_FACE | {"label": {"_type": "ClassLabel", "names": names}}
    first, second = sources.encoded("train", 0, 0), sources.encoded("train", 1, 0)
    rows = [(first, 1, "a.png"), (second, 0, "b.png")]
    sources.write_parquet_file(tmp_path / "raw" / "train.parquet", rows, features)
    build = imported(tmp_path / "raw", tmp_path)
    assert list(classes_of(build)) == names
    assert examples_of(build, "train") == [(second, 0), (first, 1)]


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([(None, 0, "x"), (b"b", 1, "y")], ("image", "label"), "row 0 has no image in it"),
        ([(b"a", None, "x"), (b"b", 1, "y")], ("image", "label"), "row 0 has no label, but None"),
        ([(b"a", -3, "x"), (b"b", 1, "y")], ("image", "label"), "a label that is -3"),
        ([(b"a", 0, "x"), (b"b", 1, "y")], ("image", "kind"), "--label=image"),
    ],
)
def test_is_refused(tmp_path, rows, names, message):
    sources.write_parquet_file(tmp_path / "raw" / "train.parquet", rows, names=names)
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "raw", tmp_path)


def test_another_column(tmp_path):
    rows = [(sources.encoded("train", 0, i), i, f"{i}") for i in range(2)]
    path = tmp_path / "raw" / "train.parquet"
    sources.write_parquet_file(path, rows, names=("photo", "kind"))
    build = imported(path, tmp_path, label="kind")
    assert [label for _, label in examples_of(build, "train")] == [0, 1]


def test_of_several_labels_one_is_chosen(tmp_path):
    kinds = {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in ("fine", "coarse")}
    image = [{"bytes": sources.encoded("train", 0, i), "path": None} for i in range(2)]
    table = pa.table({"img": image, "fine": [0, 1], "coarse": [1, 0]})
    told = {"huggingface": json.dumps({"info": {"features": kinds}})}
    (tmp_path / "raw").mkdir()
    pq.write_table(table.replace_schema_metadata(told), tmp_path / "raw" / "train.parquet")
    with pytest.raises(UserError, match="the columns img, fine, coarse; say which has the la"):
        imported(tmp_path / "raw", tmp_path)
    build = imported(tmp_path / "raw", tmp_path, label="coarse")
    assert examples_of(build, "train")[0][0] == sources.encoded("train", 0, 1)


def test_pipes_are_not_waited_for(tmp_path):
    raw = sources.write_parquet(tmp_path / "raw")
    os.mkfifo(raw / "data" / "train-9.parquet")
    os.mkfifo(raw / "data" / "train-9.tar")
    assert examples_of(imported(raw, tmp_path), "train") == sources.in_order("train")


def test_a_damaged_file_is_named(tmp_path):
    raw = sources.write_parquet(tmp_path / "raw")
    path = raw / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        imported(raw, tmp_path)
