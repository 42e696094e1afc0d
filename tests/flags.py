"""XLA's flags in tests."""

import importlib.metadata
import os

# Tests compile far more than they compute: without LLVM's optimizations, and with the older way to
# emit loops, in a fifth of the time. XLA ends the process at a flag that it does not know: the
# JAX versions from 0.11 on have only one way. The long tests (``pytest -m long``) compute more.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
QUICK = "" if os.environ.get("MIMICNORM_TEST_OPTIMIZED") else _QUICK


def xla_flags(devices: int) -> str:
    """For so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
