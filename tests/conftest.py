"""Strict settings for all tests: four CPU devices, no silent rank promotion."""

import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from tests.flags import QUICK, xla_flags

# The same small programs are compiled in many tests and in the processes they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
# With that cache, XLA writes errors about processor features to stderr on some machines,
# where tests count the lines.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = (
    "0"  # tracing is half of the time, and these a tenth
)
os.environ["XLA_FLAGS"] = xla_flags(devices=4)

import jax
import pytest

from mimicnorm_jax.config import default_config
from mimicnorm_jax.data.tfds import build_directory
from tests import archives, forkserver
from tests.runs import TINY

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What is imported stays: the collector, which tracing calls often, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def _environment_is_left_alone():
    """Where it decides how a process is started: else all later ones are started otherwise."""
    before = forkserver.at_import(os.environ)
    yield
    assert forkserver.at_import(os.environ) == before


@pytest.fixture
def float64():
    """64-bit types for one test: equality of two computations is proved in them."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session")
def tiny_config():
    """A function that makes the configuration of a run of seconds, with overrides.

    ResNet-8 of half the width (its 8-channel convolutions have a fan-in of 72, so they
    are still centred) on 8x8 digits, on one device.
    """

    def make(**overrides):
        config = default_config()
        with config.unlocked():
            config.update(
                network="resnet8",
                width=0.5,
                epochs=1.0,
                batch_size=32,
                learning_rate=0.1,
                num_devices=1,
            )
            config.data.update(name="digits", image_size=8, pad_crop=1, flip=True)
            config.schedule.update(name="constant", warmup_epochs=0.5)
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
        return config

    return make


@pytest.fixture
def tiny(tmp_path):
    """Arguments of a run of ``tests.runs.Run`` in ``tmp_path / "run"``."""
    return (*TINY, f"--workdir={tmp_path / 'run'}")


@pytest.fixture
def run_main():
    """Runs ``python -m mimicnorm_jax.main`` (or another module) as a person would.

    ``environment`` is added to this process's; None takes a name out.
    """

    def run(*arguments, module="mimicnorm_jax.main", background=False, cwd=ROOT, **environment):
        # one device: what a laptop has
        env = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)} | environment
        env = {name: str(value) for name, value in env.items() if value is not None}
        if background:
            command = [sys.executable, "-m", module, *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, cwd=cwd, env=env, **pipes)
        return forkserver.run(module, arguments, env=env, cwd=cwd)

    return run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder with both data sets, and what their preparation printed."""
    root = tmp_path_factory.mktemp("prepared")
    folder = root / "archives"
    folder.mkdir()
    archives.write_cifar100(folder / "cifar-100-binary.tar.gz")
    archives.write_imagenet(folder)
    # as an interrupted attempt leaves it
    (root / "cifar100" / "incomplete.ABC_3.0.2").mkdir(parents=True)
    (root / "extracted-cifar100-ABC").mkdir()
    outputs = {}
    for name in ("cifar100", "imagenet2012"):
        done = archives.run_tool(name, "--data-dir", root, "--sample")
        assert done.returncode == 0, done.stderr[-2000:]
        outputs[name] = done
    return root, outputs


@pytest.fixture
def build(prepared, tmp_path):
    """A copy of the prepared CIFAR-100, to be damaged."""
    root, _ = prepared
    shutil.copytree(root / "cifar100", tmp_path / "cifar100")
    return build_directory(tmp_path, "cifar100")
