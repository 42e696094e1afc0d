"""The threads of XLA's pool on CPUs, which the bits of some networks follow."""

import subprocess
import sys

import jax
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel.backend import pool_threads
from mimicnorm_jax.train.setup import configure_jax
from tests.flags import xla_flags
from tests.runs import ROOT, Run, summary

# Its 1x1 convolutions sum over images and pixels, which XLA divides among the threads.
FOLLOWS_THREADS = (
    *("--config=configs/digits_resnet20.py", "--config.network=squeezenet", "--config.width=0.25"),
    *("--config.method_options.min_fan_in=24", "--config.data.image_size=32"),
    *("--config.data.pad_crop=0", "--config.batch_size=16", "--config.max_steps=2"),
)
VERIFY_ON_ONE_PROCESSOR = """
import os
import runpy
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
runpy.run_module("mimicnorm_jax.tools.verify", run_name="__main__", alter_sys=True)
"""


def test_a_number_in_the_configuration_or_of_a_run_is_the_same_on_any_machine(
    tmp_path, monkeypatch
):
    for name, processors, fields in (("set", 1, ["--config.cpu_threads=8"]), ("found", 8, [])):
        arguments = (*FOLLOWS_THREADS, *fields, f"--workdir={tmp_path / name}")
        with Run(tmp_path / f"{name}-output", *arguments, NPROC=str(processors)) as run:
            run.succeeds()
    found, by_field = summary(tmp_path / "found"), summary(tmp_path / "set")
    assert found["threads"] == by_field["threads"] == 8
    assert found["state_sha256"] == by_field["state_sha256"]
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    verify = [sys.executable, "-c", VERIFY_ON_ONE_PROCESSOR, tmp_path / "found"]
    done = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "steps 0 to 2: the same" in done.stdout, done.stderr


def test_a_number_that_comes_too_late_is_refused(tiny_config):
    jax.devices()
    configure_jax(tiny_config(cpu_threads=pool_threads()))
    with pytest.raises(UserError, match=r"config\.cpu_threads = 77 is too late: JAX computes"):
        configure_jax(tiny_config(cpu_threads=77))
