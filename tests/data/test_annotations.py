"""ImageNet's validation images as they come: in one folder, and a file tells their classes."""

import shutil

import numpy as np
import pytest
from scipy.io import savemat

from mimicnorm_jax.errors import UserError
from tests.data.test_layout import is_right, opened, write, write_splits

CLASSES = ("n01", "n02")


def heap(folder, names):
    """Images of both classes in turn: 50 is the red of the first, 150 that of the second."""
    for number, name in enumerate(names):
        write(folder / name, 50 + 100 * (number % 2), blue=9)


def test_tiny_imagenet_as_it_unpacks(tmp_path, capsys):
    write_splits(tmp_path, ("train",), CLASSES, below="images")
    for name in CLASSES:
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1\n")
    names = [f"val_{number}.png" for number in range(6)]
    heap(tmp_path / "val" / "images", names)
    rows = (f"{name}\t{CLASSES[n % 2]}\t0\t32\t39\t55\n" for n, name in enumerate(names))
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    heap(tmp_path / "test" / "images", ["test_0.png", "test_1.png"])  # of no class
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    train, test = opened(tmp_path)
    assert is_right(train, CLASSES) and test.class_names == list(CLASSES)
    assert [(image[0, 0, 0], label) for image, label in (test[0], test[1])] == [(50, 0), (150, 1)]
    said = capsys.readouterr().err
    assert "val for test" in said and "val_annotations.txt" in said
    assert f"left out in {tmp_path}/train: .txt (2)" in said
    assert f"left out in {tmp_path}/val" not in said


def write_kaggle(root):
    place = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_splits(place, ("train",), CLASSES)
    names = [f"ILSVRC2012_val_{number:08}" for number in range(1, 7)]
    heap(place / "val", [f"{name}.png" for name in names])
    heap(place / "test", ["ILSVRC2012_test_00000001.png"])
    rows = [f"{name},{CLASSES[n % 2]} 1 2 3 4 n99 5 6 7 8 \n" for n, name in enumerate(names)]
    table = root / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    return place, table


def test_kaggles_imagenet(tmp_path):
    place, _ = write_kaggle(tmp_path)
    for asked in ("val", "validation"):
        train, test = opened(place, test_split=asked)
        assert is_right(train, CLASSES)
        assert test.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert test[1][0][0, 0, 0] == 150


def test_the_numbers_of_the_development_kit_are_not_those_of_sorted_names(tmp_path):
    place, table = write_kaggle(tmp_path)
    table.unlink()
    kit = place / "val" / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n1\n2\n1\n2\n1\n")  # n01 has the number 2 there
    shutil.move(place / "val" / "ILSVRC2012_devkit_t12", place)
    kit = place / "ILSVRC2012_devkit_t12" / "data"
    with pytest.raises(UserError, match=r"counts classes as .*meta\.mat does, which is missing"):
        opened(place, test_split="val")
    (kit / "meta.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"meta\.mat is damaged"):
        opened(place, test_split="val")
    table = np.array([(1, "n02"), (2, "n01")], [("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(kit / "meta.mat", {"synsets": table})
    train, test = opened(place, test_split="val")
    assert is_right(train, CLASSES) and test.class_names == list(CLASSES)
    assert test.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_what_is_wrong_with_them_is_said(tmp_path):
    place, table = write_kaggle(tmp_path)
    good = table.read_text()
    for content, said in (
        ("ImageId,PredictionString\n", "names no image"),
        ("a,b\n1,2\n", "is damaged: 'ImageId'"),
        (good.replace("val_0", "other_0"), "tells the class of no image"),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=said):
            opened(place, test_split="val")
    table.write_text(good.replace("n02", "n03"))
    with pytest.raises(UserError, match="differ: n02, n03"):
        opened(place, test_split="val")
    table.unlink()
    with pytest.raises(UserError, match="has no folder val"):
        opened(place, test_split="val")


def test_images_that_the_file_does_not_name_are_left_out(tmp_path, capsys):
    place, table = write_kaggle(tmp_path)
    rows = table.read_text().splitlines()
    table.write_text("\n".join(row for row in rows if "00000002" not in row))
    assert opened(place, test_split="val")[1].labels.tolist() == [0, 0, 1, 0, 1]
    assert "in no class folder (1)" in capsys.readouterr().err


def test_images_of_no_class_are_no_splits(tmp_path):
    heap(tmp_path / "train", ["0.png"])
    heap(tmp_path / "test", ["0.png"])
    with pytest.raises(
        UserError, match="the images in test, train have no classes; expected train"
    ):
        opened(tmp_path, holdout=0.1)
