"""Invariant 8: nothing heavy at import."""

import subprocess
import sys

PROBE = """
import sys

import flax.nnx, jax, optax

def packages():
    return {name.partition(".")[0] for name in sys.modules}

before = packages()
import mimicnorm_jax
from jax._src import xla_bridge
added = packages() - before - sys.stdlib_module_names
print(xla_bridge.backends_are_initialized(), *sorted(added))
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


def test_importing_the_package_loads_no_other_library_and_starts_no_backend():
    """But JAX, Flax and optax: what they take is not ours to save."""
    assert run(PROBE) == ["False", "mimicnorm_jax"]


def test_the_training_program_imports_no_tensorflow():
    assert run(TRAINING) == ["False", "False"]


def test_every_public_name_exists():
    import mimicnorm_jax

    for name in mimicnorm_jax.__all__:
        assert getattr(mimicnorm_jax, name) is not None
