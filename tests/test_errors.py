"""Invariant 10: a wrong input gets one clear line, exit code 2, and nothing is written."""

import pathlib
from typing import NamedTuple

import pytest
from PIL import Image


class Case(NamedTuple):
    """Arguments after ``--config digits``, and what the line must contain.

    ``{tmp}`` stands for a folder with the bad things that ``bad_things`` makes.
    """

    arguments: list[str]
    message: str
    config: str | None = "configs/digits_resnet20.py"
    workdir: str | None = "{tmp}/run"


FOLDER = ["--config.data.name=folder", "--config.data.image_size=8"]
CASES = {
    "unknown method": Case(["--config.method=mimicnrom"], "did you mean 'mimicnorm'"),
    "unknown network": Case(["--config.network=resnet21"], "unknown config.network 'resnet21'"),
    "unknown data set": Case(
        ["--config.data.name=mnist"], "allowed: digits, folder, idx, synthetic, tfds"
    ),
    "unknown field": Case(["--config.lerning_rate=1"], "did you mean '--config.learning_rate'"),
    "unknown nested field": Case(["--config.data.dri=x"], "did you mean '--config.data.dir'"),
    "unknown flag": Case(["--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
    "unknown mode": Case(["--mode=test"], "--mode=test"),
    "recalibration while training": Case(["--recalibrate"], "goes with --mode=eval"),
    "stray argument": Case(["epochs=3"], "unexpected argument 'epochs=3'"),
    "not a number": Case(["--config.epochs=many"], "--config.epochs=many"),
    "out of range": Case(
        ["--config.learning_rate=-1"], "config.learning_rate = -1.0 is not allowed"
    ),
    "config in a word of its own": Case(
        ["--config", "digits_resnet20", "--config.epochs=0"],
        "config.epochs = 0.0 is not allowed",
        config=None,
    ),
    "no config": Case([], "--config is missing", config=None),
    "no config but fields": Case(
        ["--workdir={tmp}/none", "--config.max_steps=6"], "--config is missing", config=None
    ),
    "no such config": Case([], "there is no such file", config="configs/digits_resnet21.py"),
    "config that raises": Case([], "failed: AttributeError", config="{tmp}/raises.py"),
    "config of another field": Case([], "failed: AttributeError", config="{tmp}/unknown.py"),
    "config that is none": Case([], "is a dict, not a ConfigDict", config="{tmp}/dict.py"),
    "config without fields": Case([], "config.method is missing", config="{tmp}/bare.py"),
    "a word among numbers": Case(
        ["--config.schedule.milestones=abc"], "config.schedule.milestones = ('abc',) is not allowed"
    ),
    "endless": Case(["--config.epochs=1e300"], "config.epochs = 1e+300 is not allowed"),
    "a seed of more than 32 bits": Case(["--config.seed=4294967296"], "allowed: 0 to 4294967295"),
    "no such folder": Case(
        [*FOLDER, "--config.data.dir={tmp}/nowhere"], "nowhere' is not a folder"
    ),
    "folder not set": Case(FOLDER, "config.data.dir is not set"),
    "no split": Case(
        [*FOLDER, "--config.data.dir={tmp}/raw"], "raw' has no images in train/<class> or <class>"
    ),
    "empty class": Case([*FOLDER, "--config.data.dir={tmp}/empty"], "train/dog has no images"),
    "corrupt image": Case([*FOLDER, "--config.data.dir={tmp}/corrupt"], "test/cat/1.jpg"),
    "tfds without a name": Case(["--config.data.name=tfds"], "config.data.tfds_name is not set"),
    "tfds not prepared": Case(
        ["--config.data.dir={tmp}"],
        "cifar100 has no prepared version; prepare it: python -m",
        config="configs/cifar100_vgg16.py",
    ),
    "random crops of pixels": Case(
        ["--config.data.random_resized_crop=True"], "digits holds pixels"
    ),
    "name too long": Case([*FOLDER, f"--config.data.dir={'x' * 300}"], "File name too long"),
    "one class": Case([*FOLDER, "--config.data.dir={tmp}/one"], "a single class, cat"),
    "batch too small": Case(
        ["--config.batch_size=1", "--config.num_devices=1"], "batch statistics need at least 2"
    ),
    "one example a device": Case(
        ["--config.batch_size=4", "--config.method=batchnorm"], "need at least 8"
    ),
    "batch and devices": Case(["--config.batch_size=30"], "30 does not divide by the 4 devices"),
    "too many devices": Case(["--config.num_devices=5"], "but the number of devices is 4"),
    "image too small": Case(
        ["--config.network=vgg11", "--config.data.image_size=16"], "multiple of 32, got 16"
    ),
    "milestones out of order": Case(["--config.schedule.milestones=(8.0,3.0)"], "out of order"),
    "fixup without branches": Case(
        ["--config.method=fixup", "--config.network=vgg11", "--config.data.image_size=32"],
        "needs residual branches",
    ),
    "option of another method": Case(["--config.method_options.bn_sync=local"], "does not apply"),
    "decay of nothing": Case(
        ["--config.optimizer.weight_decay_mask=gamma"], "matches no parameter"
    ),
    "no workdir": Case([], "--workdir= is empty", workdir=""),
    "workdir with a damaged config": Case([], "holds no JSON object", workdir="{tmp}/null"),
    "workdir with too long a name": Case([], "File name too long", workdir="{tmp}/" + "x" * 300),
    "workdir of another config": Case([], "config.seed (1 there, 0 now)", workdir="{tmp}/other"),
    "workdir that is no run": Case([], "holds no run", workdir="{tmp}/raw"),
    "workdir that is a file": Case([], "is a file", workdir="{tmp}/raises.py"),
    "workdir below a file": Case([], "is a file", workdir="{tmp}/raises.py/run"),
    "workdir not writable": Case([], "cannot be written to", workdir="/proc/mimicnorm"),
    "nothing to evaluate": Case(["--mode=eval"], "no checkpoints to evaluate"),
}


@pytest.fixture
def bad_things(tmp_path):
    (tmp_path / "raises.py").write_text("def get_config():\n    return None.config\n")
    (tmp_path / "unknown.py").write_text(
        "from mimicnorm_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.epoch = 3\n    return c\n"
    )
    (tmp_path / "dict.py").write_text("def get_config():\n    return {}\n")
    (tmp_path / "bare.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    (tmp_path / "null").mkdir()
    (tmp_path / "null" / "config.json").write_text("null")
    for split in ("train", "test"):
        (tmp_path / "one" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / split / "cat" / "0.jpg")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.txt").write_text("mine")
    for root in ("empty", "corrupt"):
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / root / split / label
                folder.mkdir(parents=True)
                if (root, split, label) != ("empty", "train", "dog"):
                    Image.new("RGB", (8, 8)).save(folder / "0.jpg")
    (tmp_path / "corrupt/test/cat/1.jpg").write_bytes(b"\xff\xd8\xff but no more")
    (tmp_path / "other").mkdir()
    return tmp_path


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*")}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_wrong_input_gets_one_line_and_exit_code_2_and_writes_nothing(case, bad_things, run_main):
    def fill(text):
        return text.replace("{tmp}", str(bad_things))

    if case.workdir == "{tmp}/other":  # a run with another seed
        import json

        from mimicnorm_jax.config import flatten

        from .test_config import ROOT, load

        config = load(ROOT / "configs/digits_resnet20.py").get_config()
        config.seed = 1
        (bad_things / "other/config.json").write_text(json.dumps(flatten(config)))
    before = snapshot(bad_things)
    arguments = [fill(argument) for argument in case.arguments]
    if case.config is not None:
        arguments = [f"--config={fill(case.config)}", *arguments]
    if case.workdir is not None:
        arguments.append(f"--workdir={fill(case.workdir)}")
    result = run_main(
        *arguments,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        PYTHONDONTWRITEBYTECODE="1",  # of the config files, which is Python's doing
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert case.message in lines[0]
    assert snapshot(bad_things) == before


def test_at_least_20_kinds_are_covered():
    assert len(CASES) >= 20


def test_the_page_of_fields_is_printed(run_main):
    result = run_main(module="mimicnorm_jax.config")
    assert result.returncode == 0
    assert "config.schedule.milestones  (default: (80.0, 110.0, 135.0))" in result.stdout
