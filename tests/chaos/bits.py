"""Which networks train to the same bits whatever the number of threads of XLA's pool.

    python -m tests.chaos.bits --json results/resilience/bits.json --steps 10

Each network is trained on the digits from the same seed with 1, 2 and 8 threads (``NPROC``), each
in a process of its own and without compiled programs of others; a row says into how many kinds
the final states fall. ``--cpu-threads 8`` sets ``config.cpu_threads``, whatever ``NPROC`` is. The
rows of other environments (other versions of JAX) are kept.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

NETWORKS = {
    "mlp": (),
    "resnet20": (),
    "vgg11": ("--config.width=0.25", "--config.method_options.min_fan_in=12"),
    "squeezenet": ("--config.width=0.5", "--config.method_options.min_fan_in=24"),
    "shufflenetv2_x1_0": ("--config.width=0.5", "--config.method_options.min_fan_in=24"),
    "resnet50": ("--config.width=0.25", "--config.method_options.min_fan_in=12"),
}
THREADS = (1, 2, 8)
COMMON = (
    *("--config=digits_resnet20", "--config.data.image_size=32", "--config.batch_size=32"),
    *("--config.data.pad_crop=0", "--config.compilation_cache="),
)


def train(network, threads, steps, cpu_threads):
    """SHA-256 of the state after some steps, and the processor time of the process."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        arguments = (*COMMON, *NETWORKS[network], f"--config.max_steps={steps}")
        arguments = (*arguments, f"--config.cpu_threads={cpu_threads}")
        arguments = (*arguments, f"--config.network={network}", f"--workdir={workdir}")
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "mimicnorm_jax.main", *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        after = os.times()
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        summary = json.loads((workdir / "summary.json").read_text())
    used = after.children_user + after.children_system
    return summary["state_sha256"], used - before.children_user - before.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cpu-threads", type=int, help="config.cpu_threads; unset: NPROC's")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    options = parser.parse_args()
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    for network in options.networks.split(","):
        found = {
            threads: train(network, threads, options.steps, options.cpu_threads)
            for threads in THREADS
        }
        row = {
            "network": network,
            "jax": importlib.metadata.version("jax"),
            "jaxlib": importlib.metadata.version("jaxlib"),
            "cpu_threads": options.cpu_threads,
            "steps": options.steps,
            "kinds": len({sha for sha, _ in found.values()}),
            "sha256": {str(threads): sha[:12] for threads, (sha, _) in found.items()},
            "processor_seconds": {str(t): round(used, 1) for t, (_, used) in found.items()},
            "date": time.strftime("%Y-%m-%d"),
        }
        key = ("network", "jax", "cpu_threads", "steps")
        rows = [other for other in rows if any(other[k] != row[k] for k in key)] + [row]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(row["network"], row["jax"], row["cpu_threads"], row["sha256"], flush=True)


if __name__ == "__main__":
    main()
