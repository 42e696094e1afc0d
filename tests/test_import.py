"""Invariant 8: nothing heavy at import."""

import subprocess
import sys

PROBE = """
import sys, time
start = time.perf_counter()
import mimicnorm_jax
seconds = time.perf_counter() - start
from jax._src import xla_bridge
print(seconds, xla_bridge.backends_are_initialized(), "tensorflow" in sys.modules)
"""

TRAINING = """
import sys
import mimicnorm_jax.train.loop, mimicnorm_jax.main, mimicnorm_jax.config
print("tensorflow" in sys.modules, "torch" in sys.modules)
"""


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_importing_the_package_is_quick_and_starts_no_backend():
    run(PROBE)  # the first import writes byte code
    seconds, backend, tensorflow = run(PROBE)
    assert float(seconds) < 3.0
    assert backend == "False"
    assert tensorflow == "False"


def test_the_training_program_imports_no_tensorflow():
    assert run(TRAINING) == ["False", "False"]


def test_every_public_name_exists():
    import mimicnorm_jax

    for name in mimicnorm_jax.__all__:
        assert getattr(mimicnorm_jax, name) is not None
