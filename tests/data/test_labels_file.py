"""Images whose classes a CSV file tells."""

import pytest

from mimicnorm_jax.config import default_config, validate
from mimicnorm_jax.data.splits import has_test_split
from mimicnorm_jax.errors import UserError
from tests.data.test_layout import is_right, opened, write

ROWS = [(f"images/{number}.png", ("cat", "dog")[number % 2]) for number in range(6)]


def write_table(root, rows, header="path,label"):
    for number, (path, name) in enumerate(ROWS):
        write(root / path, 50 if name == "cat" else 150, blue=number)
    lines = [header, *(",".join(row) for row in rows)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def test_classes_of_a_table_without_splits(tmp_path):
    write_table(tmp_path, ROWS)
    with pytest.raises(UserError, match=r"tells no splits: .*holdout=0\.1"):
        opened(tmp_path, labels_file="labels.csv")
    train, test = opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and test is None
    assert train.class_names == ["cat", "dog"]
    assert [train[index][0][0, 0, 0] for index in range(2)] == [50, 150]


@pytest.mark.parametrize(
    ("header", "change"),
    [
        ("id,breed", lambda path: path),
        ("anything,else", lambda path: path),
        ("path,label", lambda path: path.removesuffix(".png")),
        ("\ufeffPath, Label", lambda path: f"./{path}"),
    ],
)
def test_columns_and_paths_as_people_write_them(header, change, tmp_path):
    write_table(tmp_path, [(change(path), label) for path, label in ROWS], header)
    train, _ = opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_images_of_a_table_that_lie_beside_each_other_are_no_overlap(tmp_path, capsys):
    rows = [(*row, "train" if number < 4 else "test") for number, row in enumerate(ROWS)]
    write_table(tmp_path, rows, "file,class,split")
    opened(tmp_path, labels_file="labels.csv", cache_gib=0.0)
    assert "WARNING" not in capsys.readouterr().err


def test_splits_of_a_table(tmp_path):
    rows = [(*row, "Training" if number < 4 else "valid") for number, row in enumerate(ROWS)]
    write_table(tmp_path, rows, "file,class,split")
    train, test = opened(tmp_path, labels_file="labels.csv")
    assert is_right(train, per_class=2) and is_right(test, per_class=1)
    data = default_config().data
    data.update(name="folder", dir=str(tmp_path), labels_file="labels.csv")
    assert has_test_split(data)
    with pytest.raises(UserError, match="no images of the split others, but of Training, valid"):
        opened(tmp_path, labels_file="labels.csv", test_split="others")
    before = train.identity
    write_table(tmp_path, [("images/0.png", "dog", "train"), *rows[1:]], "file,class,split")
    assert opened(tmp_path, labels_file="labels.csv")[0].identity != before


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([*ROWS, ("images/9.png", "cat")], "path,label", "not in .*: images/9.png$"),
        ([*ROWS, ("a", "cat"), ("b", "cat")], "path,label", "not in .*: a and 1 more$"),
        ([*ROWS, ROWS[0]], "path,label", "has images/0.png twice"),
        ([(path, "cat") for path, _ in ROWS], "path,label", "fewer than two classes"),
        ([*ROWS, ("images/0.png",)], "path,label", "has a row of 1 columns"),
        (ROWS, "path,x,y", "has the columns path, x, y; expected: path, label"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(rows, header, said, tmp_path):
    write_table(tmp_path, rows, header)
    with pytest.raises(UserError, match=said):
        opened(tmp_path, labels_file="labels.csv", holdout=0.34)


def test_a_table_goes_with_a_folder():
    config = default_config()
    config.data.labels_file = "labels.csv"
    with pytest.raises(UserError, match=r"goes with data\.name = 'folder', not 'digits'"):
        validate(config)


def test_a_table_that_is_none(tmp_path):
    write_table(tmp_path, ROWS)
    for content, said in ((b"", "is no table"), (b"\xff\xfe\x00,\n", "is no table")):
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(UserError, match=said):
            opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        opened(tmp_path, labels_file="others.csv", holdout=0.34)


def test_a_table_without_a_header_loses_no_row(tmp_path):
    write_table(tmp_path, ROWS[1:], ",".join(ROWS[0]))
    train, _ = opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters(tmp_path, delimiter):
    write_table(tmp_path, ROWS)
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace(",", delimiter))
    train, _ = opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_names_without_folders_as_kaggles_tables_have_them(tmp_path):
    write_table(tmp_path, [(path[7:-4], name) for path, name in ROWS], "id,breed")
    train, _ = opened(tmp_path, labels_file="labels.csv", holdout=0.34)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    write(tmp_path / "others" / "1.png")
    with pytest.raises(UserError, match=r"that are not in .*, or not clearly: 1"):
        opened(tmp_path, labels_file="labels.csv", holdout=0.34)


def test_an_empty_label_is_no_class(tmp_path):
    write_table(tmp_path, [*ROWS[:3], (ROWS[3][0], " "), *ROWS[4:]])
    with pytest.raises(UserError, match=r"has no label for images/3\.png"):
        opened(tmp_path, labels_file="labels.csv", holdout=0.34)
