"""Memory of a training step by method, from the compiler: for devices that need not be here.

python -m mimicnorm_jax.tools.memory --config configs/cifar100_resnet18.py --target=tpu:v5e:2x2
python -m mimicnorm_jax.tools.memory --config configs/imagenet_resnet50.py --batch=64 \
    --methods=batchnorm,mimicnorm,mimicnorm:activation_storage=int8
python -m mimicnorm_jax.tools.memory table1   # the paper's tables, into results/memory
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

from absl import flags
from jax.sharding import Mesh

from mimicnorm_jax import command_line
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.memory.allocator import allocator_peak
from mimicnorm_jax.tools.memory.batch import largest_batch, parse_bytes
from mimicnorm_jax.tools.memory.compiled import Row, analyse
from mimicnorm_jax.tools.memory.plot import plot
from mimicnorm_jax.tools.memory.tables import TABLES, write_table
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.report import (
    BATCH,
    COMPARED,
    JSON,
    NUM_CLASSES,
    PLOT,
    check_output,
    write_json,
)
from mimicnorm_jax.tools.variants import Variant, fitting_methods, parse_variants
from mimicnorm_jax.train.setup import configure_jax, silence_false_alarms

for _name in ("batch", "methods", "json", "num-classes", "plot"):  # shown by --help
    flags.declare_key_flag(_name)

_TARGET = flags.DEFINE_string("target", "cpu", "cpu, gpu, tpu; not here: tpu:v5e:2x2, gpu:h100.")
_MAX_BATCH = flags.DEFINE_bool("max-batch", False, "Find the largest batch that fits --hbm.")
_HBM = flags.DEFINE_string("hbm", None, "Memory of a device, such as 16GiB.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "table: compilations at a time.", 1)

DEFAULT_METHODS = ("batchnorm", "mimicnorm", "nonorm", "fixup")


HEADER = (
    f"{'method':<34}{'peak MiB':>10}{'of BN':>7}{'state':>8}{'activ.':>8}{'temp':>8}"
    f"{'GFLOP':>9}{'GiB moved':>11}{'roofline':>10}"
)


def line(row: Row, baseline: Row | None) -> str:
    """A row for people; ratios are to ``baseline``, and MiB of a device."""

    def mib(count: float) -> str:
        return f"{count / 2**20:.0f}"

    ratio = "" if baseline is None else f"{row.peak_bytes / baseline.peak_bytes:.3f}"
    moved = "" if row.bytes_accessed is None else f"{row.bytes_accessed / 2**30:.1f}"
    time = "" if row.roofline_s is None else f"{1000 * row.roofline_s:.1f} ms"
    return (
        f"{row.method:<34}{mib(row.peak_bytes):>10}{ratio:>7}{mib(row.state_bytes):>8}"
        f"{mib(row.activation_bytes):>8}{mib(row.temp_bytes):>8}{row.flops / 1e9:>9.0f}"
        f"{moved:>11}{time:>10}"
    )


def _run() -> None:
    config = command_line.config()
    check_output("json", JSON.value, (".json",))
    check_output("plot", PLOT.value, (".png", ".pdf", ".svg"))
    if BATCH.value is not None:
        config.batch_size = BATCH.value
    methods = COMPARED.value
    if methods is None:
        methods = fitting_methods(config, DEFAULT_METHODS)
    if _MAX_BATCH.value != (_HBM.value is not None):
        raise UserError("--max-batch and --hbm go together: --max-batch --hbm=16GiB")
    hbm = parse_bytes(_HBM.value) if _HBM.value else 0
    variants = parse_variants(config, methods)
    configure_jax(config)
    # the steps that measure the allocator's peak run in processes of their own
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    mesh = mesh_of(_TARGET.value, config.num_devices)
    silence_false_alarms(mesh)
    device = mesh.devices.flat[0].device_kind
    print(f"{config.network}, {config.data.image_size} pixels, {mesh.size} x {device}", flush=True)
    if hbm:
        _print_largest(variants, mesh, hbm)
        return
    print(f"batch {config.batch_size}; compiling {len(variants)} steps …", flush=True)
    print(HEADER, flush=True)
    rows: list[Row] = []
    for variant in progress_bar(variants, "compiling"):
        row = analyse(variant, _TARGET.value, mesh, NUM_CLASSES.value)
        rows.append(row)
        baseline = next((r for r in rows if r.method == "batchnorm"), None)
        print(line(row, baseline), flush=True)
    records = [dataclasses.asdict(row) for row in rows]
    if ":" not in _TARGET.value:
        for record, variant in zip(records, variants, strict=True):
            record["allocator_peak_bytes"] = peak = allocator_peak(variant, mesh, NUM_CLASSES.value)
            if peak is not None:
                print(f"{variant.label}: the allocator's peak is {peak / 2**20:.0f} MiB")
    write_json(json.dumps(records, indent=2) + "\n")
    if PLOT.value:
        with refused_by_system(f"--plot={PLOT.value} cannot be written"):
            plot({f"{config.network}, batch {config.batch_size}": rows}, pathlib.Path(PLOT.value))
        print(f"picture: {PLOT.value}")


def _print_largest(variants: Sequence[Variant], mesh: Mesh, hbm: int) -> None:
    print(f"the largest batch in {_HBM.value} a device", flush=True)
    found = []
    for variant in variants:
        start = variant.config.batch_size

        def peak(batch: int, variant: Variant = variant) -> int:
            variant.config.batch_size = batch
            row = analyse(variant, _TARGET.value, mesh, NUM_CLASSES.value)
            print(f"  {variant.label}, batch {batch}: {row.peak_bytes / 2**20:.0f} MiB", flush=True)
            return row.peak_bytes

        multiple = mesh.size * 8 * variant.config.micro_batches
        batch, bytes_ = largest_batch(peak, hbm, multiple=multiple, start=start)
        found.append({"method": variant.label, "batch": batch, "peak_bytes": bytes_})
        print(f"{variant.label}: {batch or f'not even {multiple}'}", flush=True)
    write_json(json.dumps(found, indent=2) + "\n")


def _table(name: str) -> Callable[[], None]:
    def run() -> None:
        for flag in (COMPARED, BATCH, NUM_CLASSES, JSON, PLOT, _TARGET, _MAX_BATCH, _HBM):
            if flag.present:
                raise UserError(f"{name} takes no --{flag.name}")
        write_table(name, processes=_PROCESSES.value)

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    tables = {name: _table(name) for name in TABLES}
    return command_line.run_program({"": _run} | tables, without_config=TABLES, argv=argv)


if __name__ == "__main__":
    main()
