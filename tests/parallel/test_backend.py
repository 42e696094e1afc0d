"""A backend that does not start, and an accelerator that lies idle."""

import logging

import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import backend
from mimicnorm_jax.parallel.backend import print_warnings_of_jax, started, unused_accelerator


@pytest.mark.parametrize("platform", ["cuda", "nonsense", "rocm"])
def test_a_backend_that_does_not_start_is_one_line(platform, run_main, tmp_path):
    arguments = ("--config=digits_resnet20", f"--workdir={tmp_path / 'run'}")
    done = run_main(*arguments, JAX_PLATFORMS=platform)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: JAX cannot start its backend {platform} (JAX_PLATFORMS): ")
    assert line.endswith("JAX_PLATFORMS=cpu trains on the CPU")
    assert not (tmp_path / "run").exists()


def test_what_jax_says_is_passed_on():
    def busy():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': The TPU is in use by process with pid 7. "
            "(set JAX_PLATFORMS='' to automatically choose an available backend)"
        )

    def lost():
        raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")

    with pytest.raises(UserError, match=r"in use by process with pid 7\.; JAX_PLATFORMS=cpu"):
        started(busy)
    with pytest.raises(RuntimeError, match="DEADLINE_EXCEEDED") as raised:
        started(lost)  # another process: no word on the backend
    assert not isinstance(raised.value, UserError)
    assert started(lambda: [1]) == [1]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("dev/nvidia0", 'has an NVIDIA GPU, which JAX does not use: pip install "jax[cuda12]"'),
        ("dev/accel0", 'has a TPU, which JAX does not use: pip install "jax[tpu]"'),
        ("dev/vfio/0", 'has a TPU, which JAX does not use: pip install "jax[tpu]"'),
        ("dev/kfd", "has an AMD GPU, which JAX does not use: pip install jax-rocm-plugin"),
        ("dev/null", None),
    ],
)
def test_an_accelerator_that_lies_idle_is_named(device, said, tmp_path, monkeypatch):
    (tmp_path / device).parent.mkdir(parents=True)
    (tmp_path / device).touch()
    monkeypatch.delenv("JAX_PLATFORMS")
    found = unused_accelerator("cpu", tmp_path)
    assert found == (said and f"this machine {said}")
    assert unused_accelerator("gpu", tmp_path) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert unused_accelerator("cpu", tmp_path) is None


def test_warnings_of_jax_are_printed_once_in_a_line(capsys, monkeypatch):
    logger = logging.getLogger("jax")
    before = logger.level, logger.propagate, logger.handlers[:]
    monkeypatch.delenv("JAX_LOGGING_LEVEL", raising=False)
    logger.handlers = []  # of a program that an earlier test called
    try:
        print_warnings_of_jax()
        print_warnings_of_jax()
        message = "An NVIDIA GPU may be present on this machine.\nFalling back to %s."
        logging.getLogger("jax._src.xla_bridge").warning(message, "cpu")
        logging.getLogger("jax._src.xla_bridge").info("no more")
        assert capsys.readouterr().err == (
            "WARNING: An NVIDIA GPU may be present on this machine. Falling back to cpu.\n"
        )
        assert sum(isinstance(h, backend._OneLine) for h in logger.handlers) == 1
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]


def test_a_program_lets_them_pass(run_main, tmp_path):
    """Orbax is quiet, and JAX is not."""
    config = tmp_path / "config.py"
    config.write_text(
        "import logging\n"
        "from mimicnorm_jax.config import default_config\n"
        "def get_config():\n"
        "    import jax\n"
        "    devices = jax.local_devices\n"
        "    def warns():\n"
        "        logging.getLogger('jax._src.xla_bridge').warning('a GPU may be present')\n"
        "        return devices()\n"
        "    jax.local_devices = warns\n"
        "    config = default_config()\n"
        "    config.num_devices = 99\n"
        "    return config\n"
    )
    done = run_main(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "WARNING: a GPU may be present"
