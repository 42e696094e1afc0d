"""Every file that a run reads, damaged in every way: one line that names it, or no harm."""

import collections
import contextlib
import json
import random
import shutil
from typing import NamedTuple

import pytest

import mimicnorm_jax
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.main import main
from mimicnorm_jax.tools import verify
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.metrics import plot_curves
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import saved_config
from tests.wrong_inputs.damage import (
    BYTES,
    REFUSALS,
    assert_well_answered,
    damages,
    outcome,
    sample,
)

SEED = 23
IN_CI, IN_ALL = 10, 120  # of each file and reader

# What a folder of a run is opened for, and which of its files count there.
READERS = {
    "goes on": (
        "config.json",
        "data.json",
        "run.json",
        "summary.json",
        "metrics.jsonl",
        "progress",
    ),
    "is done": ("config.json", "summary.json"),
    "load": ("config.json", "run.json", "calibration.json", "metrics.jsonl", "progress"),
    "verify": ("config.json", "data.json", "summary.json", "progress"),
}


class Begun(Exception):  # noqa: N818
    """The run goes on."""


class Runs(NamedTuple):
    folder: object
    config: object
    longer: object


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config):
    """A finished run with two checkpoints, and what is asked of it."""
    folder = tmp_path_factory.mktemp("files") / "run"
    fields = {"network": "mlp", "checkpoint_every": 3 / 45, "data__holdout": 0.1}
    config = tiny_config(max_steps=6, **fields)
    loop.train(config, folder)
    return Runs(folder, config, tiny_config(max_steps=12, **fields))


@pytest.fixture
def readers(runs, monkeypatch):
    """Functions that open a folder: what takes long is made once, and no step is taken."""
    experiments = {config.max_steps: set_up(config) for config in (runs.config, runs.longer)}

    class Loop(loop._Loop):
        def run(self):
            self._close()
            raise Begun

    monkeypatch.setattr(loop, "_Loop", Loop)
    monkeypatch.setattr(loop, "set_up_together", lambda c, _: experiments[c.max_steps])
    monkeypatch.setattr(verify, "set_up", lambda _: experiments[6])
    monkeypatch.setattr(verify, "replay", lambda *_: "no digest")
    return {
        "goes on": lambda folder: loop.train(runs.longer, folder),
        "is done": lambda folder: loop.train(runs.config, folder),
        "load": mimicnorm_jax.load,
        "verify": lambda folder: verify.verify(folder, count=1, seed=0),
    }


def damaged_files(folder, name, count):
    """Path and content of a file, damaged in ``count`` ways."""
    if name == "progress":
        (path,) = (folder / "checkpoints" / "6" / "progress").rglob("metadata")
    else:
        path = folder / name
    content = path.read_bytes()
    if name != "metrics.jsonl":
        return [(path.relative_to(folder), d.name, d.content) for d in sample(content, count, SEED)]
    lines = content.splitlines(keepends=True)
    found = []
    for damage in sample(lines[-1], count, SEED):
        at = random.Random(damage.name).randrange(len(lines))
        changed = [*lines[:at], damage.content + b"\n", *lines[at + 1 :]]
        found.append((path.relative_to(folder), damage.name, b"".join(changed)))
    return found


@pytest.mark.parametrize("count", [IN_CI, pytest.param(IN_ALL, marks=pytest.mark.long)])
@pytest.mark.parametrize("opened_to", READERS)
def test_no_damage_ends_in_a_traceback(opened_to, count, runs, readers, tmp_path):
    found = collections.defaultdict(list)
    folder = tmp_path / "run"
    for name in READERS[opened_to]:
        for path, damage, content in damaged_files(runs.folder, name, count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(runs.folder, folder)
            (folder / path).write_bytes(content)
            how = outcome(lambda: readers[opened_to](folder), begun=Begun)
            found[how].append((name, damage))
    assert_well_answered(found, opened_to, at_least=len(READERS[opened_to]) * len(BYTES))


# A few of which the right answer is known: file, key and kind are named, and nothing is believed.
SAID = [
    ("summary.json", "steps is null", "is done", "steps is None, not a whole number"),
    ("summary.json", "config is a word", "is done", "config is 'mimicnrom', not an object"),
    ("summary.json", "state_sha256 is gone", "verify", "it has no state_sha256"),
    ("summary.json", "final_test_accuracy is nan", "is done", "final_test_accuracy is nan"),
    ("data.json", "train is minus one", "goes on", "train is -1, not an object"),
    ("data.json", "test.sha256 is an object", "goes on", "test is damaged: sha256 is {'a': 1}"),
    ("run.json", "view.upright is a word", "load", "upright is 'mimicnrom', not true or false"),
    ("run.json", "images.num_classes is half", "load", "num_classes is 0.5, not a whole number"),
    ("config.json", "seed is a word", "load", "seed = 'mimicnrom'"),
    ("config.json", "method is an empty word", "load", "unknown config.method ''"),
    ("config.json", "deep nesting", "load", "it is nested too deeply"),
    ("calibration.json", "6.temperature is minus one", "load", "has no positive temperature"),
]


@pytest.mark.parametrize(("name", "damage", "opened_to", "said"), SAID)
def test_file_and_key_are_named(name, damage, opened_to, said, runs, readers, tmp_path):
    folder = shutil.copytree(runs.folder, tmp_path / "run")
    path = folder / name
    (content,) = (d.content for d in damages(path.read_bytes()) if d.name == damage)
    path.write_bytes(content)
    with pytest.raises(REFUSALS) as raised:
        readers[opened_to](folder)
    assert said in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize("reader", ["goes on", "load"])
def test_a_damaged_line_of_metrics_is_named_unless_it_is_the_last(reader, runs, readers, tmp_path):
    folder = shutil.copytree(runs.folder, tmp_path / "run")
    path = folder / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, *others]) + first[:10])  # as a crash leaves it
    with contextlib.suppress(Begun):
        readers[reader](folder)
    path.write_bytes(b"".join([first[:10] + b"\n", *others]))
    with pytest.raises(UserError, match=r"line 1 of .*metrics\.jsonl"):
        readers[reader](folder)


def test_links_in_a_folder_are_not_followed(runs, readers, tmp_path):
    """Where the program drafts a file, or locks the folder, someone else may have put a link."""
    folder = shutil.copytree(runs.folder, tmp_path / "run")
    (folder / "run.lock").unlink(missing_ok=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    drafts = ("config.tmp", "data.tmp", "run.tmp", "metrics.tmp")
    names = (*drafts, "run.lock", "config.json", "data.json", "metrics.jsonl", "curves.png")
    for name in names:
        content = (folder / name).read_bytes() if (folder / name).exists() else b"mine"
        (mine / name).write_bytes(content)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine / name)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    with pytest.raises(UserError, match=r"run\.lock is a link"):
        readers["goes on"](folder)
    (folder / "run.lock").unlink()
    with pytest.raises(Begun):
        readers["goes on"](folder)
    plot_curves(folder, "a run")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_compiled_programs_that_a_run_names_are_not_taken(runs, tmp_path):
    """They are machine code; what is given with the command is taken."""
    folder = shutil.copytree(runs.folder, tmp_path / "run")
    fields = json.loads((folder / "config.json").read_text())
    fields["compilation_cache"] = str(folder / "programs")
    (folder / "config.json").write_text(json.dumps(fields))
    assert saved_config(folder).compilation_cache == "auto"
    assert not (folder / "programs").exists()


@pytest.mark.filterwarnings("ignore:the load_module")  # by ml_collections
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a":', "cannot read {}: Expecting value"),
        (b"\xff\xfe", "cannot read {}: "),
        (b'{"width": "x"}', "{}: width = 'x': "),
    ],
)
def test_a_run_that_is_given_alone_names_its_configuration(content, said, runs, tmp_path, capsys):
    """The folder stands for a config file then, whose errors come in another way."""
    folder = shutil.copytree(runs.folder, tmp_path / "run")
    (folder / "config.json").write_bytes(content)
    assert main([f"--workdir={folder}"]) == 2
    error = capsys.readouterr().err
    assert f"error: {said.format(folder / 'config.json')}" in error and error.count("\n") == 1
