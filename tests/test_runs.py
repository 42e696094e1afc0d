"""``fit``, ``evaluate`` and ``main([...])``: runs from Python, more than once in a process."""

import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import FrozenConfigDict
from PIL import Image

import mimicnorm_jax
from mimicnorm_jax.config import default_config
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.guest import JAX_OPTIONS, guests, process_left_as_it_was
from mimicnorm_jax.main import main
from mimicnorm_jax.train.setup import configure_jax

TINY = {"network": "mlp", "max_steps": 3, "data.image_size": 8, "batch_size": 32}

of_ml_collections = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def arguments(workdir, **more):
    fields = TINY | {name.replace("__", "."): value for name, value in more.items()}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config", "digits_resnet20", f"--workdir={workdir}", *given]


def test_a_run_may_be_made_again_and_in_a_thread_and_is_the_same(tmp_path):
    options = {name: getattr(jax.config, name) for name in JAX_OPTIONS}
    first = mimicnorm_jax.fit("digits_resnet20", tmp_path / "first", overrides=TINY)
    exact = TINY | {"precision": "float64", "compilation_cache": str(tmp_path / "cache")}
    assert mimicnorm_jax.fit("digits_resnet20", tmp_path / "exact", overrides=exact)
    # what the second one set for itself is not left behind
    assert options == {name: getattr(jax.config, name) for name in options}
    found = {}

    def work():
        found.update(mimicnorm_jax.fit("digits_resnet20", tmp_path / "third", overrides=TINY))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["state_sha256"] == first["state_sha256"]
    assert json.loads((tmp_path / "first" / "summary.json").read_text()) == first


def test_what_was_trained_is_evaluated_and_goes_on(tmp_path):
    config = mimicnorm_jax.read_config("digits_resnet20", TINY)
    summary = mimicnorm_jax.fit(config, str(tmp_path / "run"))
    found = mimicnorm_jax.evaluate(tmp_path / "run", "latest")
    assert found["step"] == 3 and found["test_accuracy"] == summary["final_test_accuracy"]
    assert np.sum(found["confusion"]) == found["test_examples"] == 360
    assert len(found["classes"]) == 10
    again = mimicnorm_jax.fit(config, tmp_path / "run", overrides={"max_steps": 5})
    assert (again["steps"], again["resumed_from_step"]) == (5, 3)
    assert config.max_steps == 3  # a copy was changed
    with pytest.raises(UserError, match="unknown which 'last'"):
        mimicnorm_jax.evaluate(tmp_path / "run", "last")
    with pytest.raises(UserError, match="unknown labels 'number'"):
        mimicnorm_jax.evaluate(tmp_path / "run", labels="number")
    with pytest.raises(UserError, match="nowhere does not exist"):
        mimicnorm_jax.evaluate(tmp_path / "nowhere")


def test_without_a_workdir_it_is_that_of_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mimicnorm_jax.fit("digits_resnet20", overrides=TINY)
    mimicnorm_jax.fit(mimicnorm_jax.read_config("digits_resnet20", TINY))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["digits_resnet20-mimicnorm-s0", "mlp-mimicnorm-s0"]


def test_a_config_file_is_read_with_its_argument(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mimicnorm_jax.config import default_config\n"
        "def get_config(epochs='2'):\n"
        "    config = default_config()\n"
        "    config.epochs = float(epochs)\n"
        "    return config\n"
    )
    assert mimicnorm_jax.read_config(path).epochs == 2.0
    made = mimicnorm_jax.read_config(f"{path}:7", {"data.dir": tmp_path, "data.mean": [0.5]})
    assert (made.epochs, made.data.dir, made.data.mean) == (7.0, str(tmp_path), (0.5,))
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from mimicnorm_jax.config import default_config as get_config\n"
        "@dataclasses.dataclass\n"
        "class Mine:\n"
        "    rate: float\n"
    )
    assert mimicnorm_jax.read_config(path, {"learning_rate": np.float64(0.2)}).learning_rate == 0.2
    frozen = mimicnorm_jax.read_config(FrozenConfigDict(default_config()), {"epochs": 3})
    assert frozen.epochs == 3
    own = default_config()
    assert mimicnorm_jax.read_config(own) is not own


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("1 / 0", {}, r"mine\.py failed: ZeroDivisionError: division by zero"),
        ("def get_config(): return 3", {}, "returns a int, no ConfigDict"),
        ("x = 1", {}, r"mine\.py failed: AttributeError"),
        ("import sys; sys.exit('no')", {}, r"mine\.py failed: SystemExit: no"),
        (None, {"epoch": 3}, r"unknown field 'epoch' \(did you mean 'epochs'\?\)"),
        (None, {"epochs": "three"}, "epochs = 'three': "),
        (None, {"method": "batchnrom"}, "unknown config.method 'batchnrom'"),
        (None, {"data.dir": "photos"}, r"'digits' reads no files; .*--config\.data\.name=folder"),
    ],
)
def test_a_wrong_input_is_named_and_nothing_is_written(content, overrides, message, tmp_path):
    config = "digits_resnet20"
    if content is not None:
        config = tmp_path / "mine.py"
        config.write_text(content)
    with pytest.raises(UserError, match=message):
        mimicnorm_jax.fit(config, tmp_path / "run", overrides=overrides)
    with pytest.raises(UserError, match="a configuration is a NoneType"):
        mimicnorm_jax.fit(None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@of_ml_collections
def test_the_program_is_called_with_arguments_and_does_not_exit(tmp_path, capsys):
    before = list(sys.argv)
    assert main(arguments(tmp_path / "a", seed=1)) == 0
    assert main(arguments(tmp_path / "b")) == 0  # without the seed of the first
    seeds = [json.loads((tmp_path / name / "config.json").read_text())["seed"] for name in "ab"]
    assert seeds == [1, 0]
    capsys.readouterr()
    assert main(["--mode=eval", f"--workdir={tmp_path / 'a'}"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["latest"]["step"] == 3
    for wrong, message in [
        (["--config", "digit_resnet20"], "error: unknown config 'digit_resnet20'"),
        (["--labels=numbers", *arguments(tmp_path / "c")], "error: --labels goes with --mode=eval"),
        ([], "error: --config is missing"),
    ]:
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith(message)
    assert sys.argv == before and not (tmp_path / "c").exists()
    for _ in range(2):
        assert main(["--help"]) in (0, 1)
        output = capsys.readouterr()
        assert "--helpfull" in output.out and "error" not in output.err


@of_ml_collections
def test_a_flagfile_may_say_which_configuration(tmp_path):
    file = tmp_path / "flags"
    _, name, *rest = arguments(tmp_path / "run")
    file.write_text("\n".join([f"--config={name}", *rest]))
    assert main([f"--flagfile={file}", "--config.seed=4"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 4
    assert main([f"--flagfile={tmp_path / 'none'}"]) == 2


@of_ml_collections
def test_the_program_leaves_the_flags_and_types_of_its_caller(tmp_path):
    name = "flag_of_a_caller"
    flags.DEFINE_string(name, "unset", "A flag of the program that calls.")
    flags.FLAGS[name].parse("set")
    flags.FLAGS.mark_as_parsed()
    before = {option: getattr(jax.config, option) for option in JAX_OPTIONS}
    assert main(arguments(tmp_path / "run", precision="float64")) == 0
    assert getattr(flags.FLAGS, name) == "set" and flags.FLAGS.is_parsed()
    assert not [known for known in flags.FLAGS if known.startswith("config.")]
    assert before == {option: getattr(jax.config, option) for option in JAX_OPTIONS}
    delattr(flags.FLAGS, name)


def test_runs_at_the_same_time_leave_the_process_as_the_first_found_it(tiny_config):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with process_left_as_it_was():
            entered.set()
            leave.wait(60)

    with process_left_as_it_was():
        configure_jax(tiny_config(precision="float64"))
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60) and guests() == 2
        with pytest.raises(
            UserError, match="another run of this process computes with other types"
        ):
            configure_jax(tiny_config(precision="float32"))
    assert jax.config.jax_enable_x64  # the other one is not done
    leave.set()
    thread.join()
    assert not jax.config.jax_enable_x64 and guests() == 0


def test_deterministic_kernels_cannot_be_chosen_too_late(tiny_config, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    configure_jax(tiny_config(deterministic=True))
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: True)
    configure_jax(tiny_config(deterministic=True))  # a CPU, which is deterministic
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"config\.deterministic is too late"):
        configure_jax(tiny_config(deterministic=True))


SCRIPT = """
import mimicnorm_jax
{guard}
    mimicnorm_jax.fit("digits_resnet20", {workdir!r}, overrides={overrides!r})
"""


@pytest.mark.parametrize(
    ("guard", "works"),
    [
        pytest.param('if __name__ == "__main__":', True, marks=pytest.mark.long),
        ("for _ in range(1):", False),
    ],
)
def test_worker_processes_need_a_main_guard_and_say_so(guard, works, tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for shade in range(4):
                pixels = np.full((8, 8, 3), 40 * shade + (name == "b"), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{shade}.png")
    overrides = TINY | {"data.name": "folder", "data.dir": str(tmp_path), "data.cache_gib": 0.0}
    overrides |= {"data.processes": 1, "batch_size": 4, "max_steps": 2, "num_devices": 1}
    script = tmp_path / "script.py"
    workdir = str(tmp_path / "run")
    script.write_text(SCRIPT.format(guard=guard, workdir=workdir, overrides=overrides))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    if works:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "summary.json").exists()
        assert "leaked" not in done.stderr
    else:
        last = done.stderr.splitlines()[-1]
        assert f"config.data.processes = 1: worker processes run {script} again" in last
        assert not (tmp_path / "run").exists()
