"""Every flag and field with every kind of value: one line and exit code 2, or a beginning."""

import collections
import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.flag_values import read_values
from mimicnorm_jax.paper import drawing
from mimicnorm_jax.paths import expanded
from mimicnorm_jax.tools import loss_floor, networks
from mimicnorm_jax.train.workdir import check_workdir
from tests.flags import QUICK
from tests.runs import ROOT
from tests.wrong_inputs.command_lines import NO_NUMBERS, OTHERS, lines, program_module

# of ml_collections, about itself
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")

SEED = 23
IN_CI, IN_ALL = 600, 5000


class Begun(BaseException):
    """A program is about to compute: what was wrong with its command line it has not seen."""


def begin(*_, **__):
    raise Begun


@pytest.fixture
def _nothing_computes(tmp_path, monkeypatch):
    """In a folder with a file and a folder, where a program ends at its first look at a device."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for module, name in (
        *((jax, "devices"), (jax, "local_devices"), (jax, "default_backend")),
        *((networks, "table_line"), (loss_floor, "floors"), (drawing, "load")),
        (importlib.import_module("mimicnorm_jax.parallel.startup"), "roll_call"),
        (importlib.import_module("mimicnorm_jax.train.setup"), "make_mesh"),
    ):
        monkeypatch.setattr(module, name, begin)


def outcome(line):
    """``begun``, ``refused``, or what else became of a command line."""
    module = importlib.import_module(program_module(line.program))
    before = snapshot()
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = module.main(list(line.arguments))
        except Begun:
            return "accepted, which it must not be" if line.refused else "begun"
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    said = errors.getvalue().strip().splitlines()
    if code != 2 or len(said) != 1 or not said[0].startswith("error: "):
        return f"exit code {code}, {errors.getvalue()[:300]!r}"
    if len(said[0]) > 700:
        return f"a line of {len(said[0])} characters"
    if snapshot() != before:
        return f"refused, and wrote {snapshot() - before}"
    return "refused"


def snapshot():
    return {str(path) for path in pathlib.Path.cwd().rglob("*")}


def check(chosen):
    found = collections.defaultdict(list)
    for line in chosen:
        found[outcome(line)].append((line.program, line.arguments[-1][:80]))
    counts = {what: len(which) for what, which in found.items()}
    print(counts)
    assert counts.keys() <= {"begun", "refused"}, {
        what: which[:5] for what, which in found.items() if what not in ("begun", "refused")
    }
    # a generator of which nearly all is accepted, or nearly nothing, tests nothing
    assert 0.5 < counts["refused"] / len(chosen) < 0.98


@pytest.mark.usefixtures("_nothing_computes")
@pytest.mark.parametrize(
    ("count", "seed"), [(IN_CI, SEED), pytest.param(IN_ALL, SEED + 1, marks=pytest.mark.long)]
)
def test_a_wrong_command_line_gets_one_line_and_writes_nothing(count, seed):
    check(random.Random(seed).sample(list(lines()), count))


PATHS = (*NO_NUMBERS, *OTHERS, "x/" * 3000, "/proc/nothing", "/dev/null/x", "run\n", "a" * 300)


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_a_workdir_that_cannot_be_used_is_said(path, tmp_path, monkeypatch, tiny_config):
    """The programs above end before they look at it."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    before = snapshot()
    with contextlib.suppress(UserError):
        check_workdir(expanded(path), tiny_config())
    assert snapshot() == before
    with contextlib.suppress(UserError):
        drawing.make_folder(expanded(path))


def test_a_workdir_that_is_not_utf_8_is_refused_before_it_trains(tmp_path, tiny_config):
    with pytest.raises(UserError, match="is not UTF-8, which TensorStore needs"):
        check_workdir(tmp_path / "\udcff", tiny_config())


def shell(command, cwd, **environment):
    """Runs a program with its streams as a shell makes them."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK} | environment
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {command}"], cwd=cwd, env=env, capture_output=True
    )


def test_a_terminal_that_knows_ascii_only_shows_escapes(tmp_path):
    command = "mimicnorm_jax.main --config=digits_resnet20 --workdir=é --config.num_devices=99"
    done = shell(command.replace("é", "é/file"), tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 2 and b"error: config.num_devices = 99" in done.stderr
    (tmp_path / "é").write_text("mine")
    done = shell(command, tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 2 and b"--workdir=\\xe9 is a file" in done.stderr


def test_an_output_that_is_full_ends_the_program_with_a_code(tmp_path):
    arguments = "mimicnorm_jax.main --config=digits_resnet20 --workdir=run"
    done = shell(f"{arguments} > /dev/full", tmp_path)
    assert done.returncode == 1 and done.stderr == b"error: No space left on device\n"
    assert shell(f"{arguments} --config.epochs=0 2> /dev/full", tmp_path).returncode == 2
    verify = "mimicnorm_jax.tools.verify nothing 2> /dev/full"
    assert shell(verify, tmp_path).returncode == 2


def of_processes():
    """40 command lines that are refused, as processes of their own."""
    wrong = [line for line in lines() if line.refused and "\udcff" not in line.arguments[-1]]
    return random.Random(SEED).sample(wrong, 40)


def test_40_of_them_as_processes(tmp_path, run_main):
    (tmp_path / "file").write_text("mine")
    failed = {}
    for line in of_processes():
        done = run_main(*line.arguments, module=line.program, cwd=tmp_path)
        said = done.stderr.strip().splitlines()
        if done.returncode != 2 or len(said) != 1 or not said[0].startswith("error: "):
            failed[line.program, line.arguments[-1][:60]] = done.returncode, done.stderr[-300:]
    assert not failed
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_json_of_flags_is_complete():
    """``lines`` takes the flags of the programs from it."""
    root = pathlib.Path(__file__).parent.parent
    assert len(json.loads((root / "program_flags.json").read_text())) >= 13


@pytest.mark.parametrize(
    ("given", "read", "unset"),
    [
        (["--config.max_steps=1e3"], ["--config.max_steps=1000"], ()),
        (["--config.max_steps", "1_000"], ["--config.max_steps=1000"], ()),
        (["--config.max_steps=None"], [], ("max_steps",)),
        (["--config.max_steps=5", "--config.max_steps="], [], ("max_steps",)),
        (["--config.max_steps=None", "--config.max_steps=5"], ["--config.max_steps=5"], ()),
        (["--config.data.dir=None"], ["--config.data.dir=None"], ()),
        (["--config.data.flip", "--workdir=x"], ["--config.data.flip", "--workdir=x"], ()),
        (["--config.data.flip=false"], ["--config.data.flip=false"], ()),
        (["--config.method_options.conv_bias=None"], [], ("method_options.conv_bias",)),
        (["--config.learning_rate", "-1"], ["--config.learning_rate=-1"], ()),
        (["--workdir", "1e3", "run"], ["--workdir", "1e3", "run"], ()),
    ],
)
def test_values_are_read_as_people_write_them(given, read, unset):
    found = read_values(["program", *given])
    assert found.argv == ["program", *read] and found.unset == unset


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--config.seed=1.5", r"--config\.seed='1\.5' is not a whole number"),
        ("--config.data.flip=maybe", r"--config\.data\.flip='maybe' is neither true nor false"),
    ],
)
def test_values_of_another_kind_are_said_in_words(given, said):
    with pytest.raises(UserError, match=said):
        read_values(["program", given])
