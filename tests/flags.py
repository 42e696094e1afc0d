"""XLA's flags in tests."""

import os

# Tests compile far more than they compute: without LLVM's optimizations in half of the time. The
# long ones (``pytest -m long``) are the other way round.
_QUICK = "--xla_backend_optimization_level=0"
QUICK = "" if os.environ.get("MIMICNORM_TEST_OPTIMIZED") else _QUICK


def xla_flags(devices: int) -> str:
    """For so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
