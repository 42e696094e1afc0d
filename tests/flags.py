"""XLA's flags in tests."""

# Tests compile far more than they compute: without LLVM's optimizations in half of the time.
QUICK = "--xla_backend_optimization_level=0"


def xla_flags(devices: int) -> str:
    """For so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
