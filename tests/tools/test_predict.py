"""Predictions from the command line."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import mimicnorm_jax
from mimicnorm_jax.data.generated import read_digits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.loop import train


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("predict") / "run"
    train(tiny_config(network="mlp"), workdir)
    return workdir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Seventy digits as files, in two folders, beside what is no image."""
    folder = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(read_digits()[0][:70]):
        path = folder / f"{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "notes.txt").write_text("not asked for")
    return folder


@pytest.fixture
def predict(run_main):
    def run(*arguments, **environment):
        return run_main(*arguments, module="mimicnorm_jax.tools.predict", **environment)

    return run


def test_it_says_what_the_network_says(predict, run, digits, tmp_path):
    numbers, table, picture = (tmp_path / f"answers.{ending}" for ending in ("json", "csv", "png"))
    outputs = (f"--json={numbers}", f"--csv={table}", f"--plot={picture}")
    done = predict(run, digits, "--top=3", *outputs)
    assert done.returncode == 0, done.stderr
    paths = sorted(digits.glob("*/*.png"))
    network = mimicnorm_jax.load(run)
    expected = network.predict(paths)
    found = json.loads(numbers.read_text())
    assert [answer["path"] for answer in found] == [str(path) for path in paths]
    order = np.argsort(-expected, -1)[:, :3]
    likeliest = np.take_along_axis(expected, order, -1)
    named = [[c["class"] for c in answer["classes"]] for answer in found]
    assert named == [[network.classes[i] for i in row] for row in order]
    given = [[c["probability"] for c in answer["classes"]] for answer in found]
    np.testing.assert_allclose(given, likeliest, rtol=1e-5)
    header, *rows = csv.reader(table.read_text().splitlines())
    assert header == ["path", *(f"{n}_{i}" for i in (1, 2, 3) for n in ("class", "probability"))]
    assert [row[0] for row in rows] == [str(path) for path in paths]
    assert float(rows[5][4]) == pytest.approx(given[5][1]) and rows[5][3] == named[5][1]
    first = f"{paths[0]}:  {100 * given[0][0]:5.1f} % {named[0][0]}"
    assert done.stdout.splitlines()[0].startswith(first)
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 1000


def test_damaged_images_are_named_and_left_out(predict, run, digits, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    good = digits / "0" / "00.png"
    done = predict(run, good, tmp_path / "bad.png", tmp_path / "bad.png", f"--csv={tmp_path}/a.csv")
    assert done.returncode == 1
    assert done.stderr.count(f"cannot read image {tmp_path}/bad.png: it is no image") == 2
    assert done.stderr.splitlines()[-1] == "2 of 3 images could not be read"
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_folders_and_lists_stand_for_their_images(digits, tmp_path, monkeypatch):
    from mimicnorm_jax.tools import predict as tool

    paths = sorted((digits / "1").iterdir())
    assert tool.images_in([str(digits / "1")]) == paths
    monkeypatch.setattr("sys.stdin.read", lambda: f"{paths[3]}\n\n{paths[0]}\n", raising=False)
    assert tool.images_in(["-", str(paths[1])]) == [paths[3], paths[0], paths[1]]
    (tmp_path / "no_image.png").mkdir()
    shutil.copy(paths[0], tmp_path / "1.png")
    monkeypatch.setattr("sys.stdin.read", lambda: f"{tmp_path}\n", raising=False)
    assert tool.images_in(["-"]) == [tmp_path / "1.png"]
    monkeypatch.setattr("sys.stdin.read", lambda: "\n", raising=False)
    with pytest.raises(UserError, match="the list on standard input is empty"):
        tool.images_in(["-"])


def test_a_name_that_is_no_text_is_kept(tmp_path):
    from mimicnorm_jax.tools import predict as tool

    path = os.fsdecode(b"\xff.png")
    answer = {"path": path, "classes": [{"class": "é", "probability": 0.5}]}
    tool.write_csv([answer], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().splitlines()[1] == b"\xff.png,\xc3\xa9,0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which run and which images: RUN PATH…"),
        (["RUN"], "say which run and which images: RUN PATH…"),
        (["RUN", "nowhere"], "'nowhere' does not exist"),
        (["RUN", ""], "'' does not exist"),
        (["", "DIGITS"], "say which run and which images: RUN PATH…"),
        (["RUN", "EMPTY"], "empty has no images"),
        (["EMPTY", "DIGITS"], "is not the folder of a run"),
        (["RUN", "DIGITS", "--which=last"], "flag --which=last"),
        (["RUN", "DIGITS", "--csv=a.txt"], "--csv=a.txt does not end in .csv"),
        (["RUN", "DIGITS", "--config=digits_resnet20"], "this program takes no --config"),
    ],
)
def test_a_wrong_command_line_is_one_line(predict, run, digits, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    named = {"RUN": run, "DIGITS": digits, "EMPTY": tmp_path / "empty"}
    done = predict(*(named.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
