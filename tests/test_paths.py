"""Paths in flags and fields, as people write them."""

import pathlib
import subprocess
import sys

import pytest

from mimicnorm_jax.config import default_config
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.paths import expanded, expanded_text


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_SET", raising=False)


def test_homes_and_variables(tmp_path):
    assert expanded("~/a") == expanded("$HOME/a") == expanded("${HOME}/a") == tmp_path / "a"
    assert expanded(pathlib.Path("$SCRATCH") / "b") == tmp_path / "scratch" / "b"
    assert expanded("a/~/$") == pathlib.Path("a/~/$")
    assert expanded_text("gs://bucket/$SCRATCH") == f"gs://bucket/{tmp_path}/scratch"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$NOT_SET/a", r"'\$NOT_SET/a': the variable \$NOT_SET is not set"),
        ("gs://b/${NOT_SET}", r"the variable \$NOT_SET is not set"),
        ("~nobody-has-this-name/a", r"there is no user 'nobody-has-this-name'"),
    ],
)
def test_what_stands_for_nothing_is_no_folder(path, said):
    with pytest.raises(UserError, match=said):
        expanded_text(path)


@pytest.mark.parametrize("directory", ["~/photos", "$HOME/photos"])
def test_fields(tmp_path, directory):
    (tmp_path / "photos").mkdir()
    data = default_config().data
    data.update(name="folder", dir=directory)
    with pytest.raises(UserError, match="it has no folders"):
        open_splits(data)


def test_flags(tmp_path):
    arguments = ["--classes=2", "--batches=2", "--plot=~/floor.png"]
    command = [sys.executable, "-m", "mimicnorm_jax.tools.loss_floor", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "floor.png").is_file()
    assert not (tmp_path / "~").exists()
