"""Runs of the training program, of one process or several, as tests start and end them."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import time

from tests import forkserver
from tests.flags import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
# A step takes a millisecond, and to compile it a tenth of a second; with convolutions, half of one.
TINY = (
    *("--config=configs/digits_resnet20.py", "--config.network=mlp", "--config.width=0.5"),
    *("--config.data.image_size=8", "--config.log_every=1", "--config.schedule.warmup_epochs=0.5"),
)

EVERY_STEP = "--config.checkpoint_every=0.01"
LONG = "--config.epochs=500"


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Run:
    """One run: its processes, whose output goes to files (a full pipe would stop them)."""

    def __init__(self, folder, *arguments, count=1, devices=1, flags=(), **environment):
        """``flags``: what only the i-th process is given; ``environment``: of all."""
        folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        env = os.environ | {
            "XLA_FLAGS": xla_flags(devices),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        env |= environment
        address = f"--coordinator=localhost:{free_port()}"
        self.processes, self._outputs = [], []
        for index in range(count):
            place = (address, f"--num-processes={count}", f"--process-id={index}")
            given = [
                *map(str, arguments),
                *(place if count > 1 else ()),
                *(flags[index] if flags else ()),
            ]
            attempt = sum(1 for _ in folder.glob(f"{index}.*.out"))
            paths = tuple(folder / f"{index}.{attempt}.{kind}" for kind in ("out", "err"))
            out, err = paths
            process = forkserver.start(
                "mimicnorm_jax.main", given, env=env, cwd=ROOT, out=out, err=err
            )
            self.processes.append(process)
            self._outputs.append(paths)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def __getitem__(self, index):
        return self.processes[index]

    def output(self, index=0):
        return self._outputs[index][0].read_text()

    def errors(self, index=0):
        """What a process wrote to stderr, without what Gloo and C++ say."""
        return self._outputs[index][1].read_text()

    def wait(self, seconds=180):
        """Exit codes, by process; kills what is left after so long."""
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.everything()}") from error

    def everything(self):
        return "\n".join(
            f"[{i}] {self.output(i)}\n[{i}] {self.errors(i)}" for i in range(len(self.processes))
        )

    def succeeds(self, seconds=180):
        """Waits for a good end; returns what process 0 printed."""
        codes = self.wait(seconds)
        assert not any(codes), (codes, self.everything())
        return self.output()

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait_until(self, condition, seconds=120, period=0.002):
        """Waits for a condition while the processes live."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.everything()
            assert time.monotonic() < deadline, f"not after {seconds} s: {self.everything()}"
            time.sleep(period)


def descendants(pid):
    """Processes below one, their own children included."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def _lives(pid):
    """Whether a process is there, and not only its exit code, which nobody asked for."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def still_alive(processes, seconds=10):
    """Those of some processes that have not ended after so long."""
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return list(filter(_lives, processes))


def rows(workdir):
    path = workdir / "metrics.jsonl"
    parsed = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:  # read in the middle of a line
            continue
    return parsed


def logged_step(workdir):
    return max((row["step"] for row in rows(workdir)), default=0)


def saved_steps(workdir):
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def continues(tmp_path, arguments, *extra):
    """The same command goes on from a checkpoint and comes to its end: its summary."""
    with Run(tmp_path / "again", *arguments, *extra) as run:
        run.succeeds()
    return summary(tmp_path / "run")
