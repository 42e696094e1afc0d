"""A forked program is the program that ``python -m`` starts."""

import os
import signal
import subprocess
import sys

import pytest

from tests import forkserver
from tests.flags import QUICK

from .conftest import ROOT

SHOW = """
import atexit, os, signal, sys, threading, time, warnings
import jax
print(sys.argv[1:], os.getcwd(), __name__, sys.path[0], sorted(os.environ))
print(jax.device_count(), jax.process_count(), [f[:3] for f in warnings.filters[-5:]])
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGCHLD), sys.stdin.read())
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def environment():
    flags = f"--xla_force_host_platform_device_count=3 {QUICK}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "A": "b"}


def test_it_is_like_the_one_that_python_starts(tmp_path, environment):
    (tmp_path / "shown.py").write_text(SHOW)
    forked = forkserver.run("shown", ["x", "y z"], env=environment, cwd=tmp_path)
    command = [sys.executable, "-m", "shown", "x", "y z"]
    started = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert forked.stdout == started.stdout
    assert forked.stdout.endswith("thread\nat exit\n") and "\n3 1 [" in forked.stdout
    assert (forked.stderr, forked.returncode) == (started.stderr, 3)


def test_it_is_killed_and_told_of(tmp_path, environment):
    (tmp_path / "sleeps.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(100)\n")
    places = {"out": tmp_path / "out", "err": tmp_path / "err"}
    process = forkserver.start("sleeps", [], env=environment, cwd=tmp_path, **places)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == process.poll() == -signal.SIGKILL


def test_another_environment_at_import_is_given_by_an_ordinary_start(tmp_path, environment):
    (tmp_path / "shown.py").write_text("import jax\nprint(jax.config.jax_enable_x64)\n")
    environment["JAX_ENABLE_X64"] = "true"
    assert forkserver.run("shown", [], env=environment, cwd=tmp_path).stdout == "True\n"
