"""The memory columns of the paper's Tables 1 and 3, with ours beside them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import runpy
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.tools.compiled import Row, analyse
from mimicnorm_jax.tools.memory_plot import plot
from mimicnorm_jax.tools.targets import mesh_of
from mimicnorm_jax.tools.variants import parse_variants

CONFIGS = pathlib.Path("configs")
RESULTS = pathlib.Path("results", "memory")
TPU = "tpu:v5e:2x2"
# The batch sizes of the paper's memory columns; a single device.
_EVERYWHERE = ("batchnorm", "mimicnorm", "nonorm", "plain")


class Entry(NamedTuple):
    """A row of a table: a network, and the paper's memory in MB by method.

    Attributes:
      config: name of the file in ``configs/``.
      paper: what the paper measured with PyTorch and nvidia-smi.
      batch: examples in a step.
      more: further variants that are compiled for the TPU.
    """

    config: str
    paper: dict[str, int]
    batch: int = 256
    more: tuple[str, ...] = ()


_INT8, _INT4 = "mimicnorm:activation_storage=int8", "mimicnorm:activation_storage=int4"
_COMPRESSED = (_INT8, _INT4)
_COMBINED = (
    *("batchnorm:remat=block", "batchnorm:remat=dots_saveable"),
    *("mimicnorm:remat=block", *_COMPRESSED, f"{_INT8}:remat=block"),
    *("mimicnorm:micro_batches=4", f"{_INT8}:micro_batches=4", f"{_INT4}:micro_batches=4"),
)
_LARGE = ("mimicnorm:batch_size=4096:micro_batches=16",)

TABLES: dict[str, tuple[Entry, ...]] = {
    "table1": (
        Entry("cifar100_vgg11", {"batchnorm": 2971, "mimicnorm": 2851, "nonorm": 2831}),
        Entry("cifar100_vgg16", {"batchnorm": 3745, "mimicnorm": 3489, "nonorm": 3469}),
        Entry(
            "cifar100_resnet18",
            {"batchnorm": 4447, "fixup": 4743, "mimicnorm": 4157},
            more=("fixup", *_COMBINED),
        ),
        Entry(
            "cifar100_resnet50", {"batchnorm": 8533, "fixup": 10283, "mimicnorm": 7533}, batch=128
        ),
        Entry("cifar100_squeezenet", {"batchnorm": 3687, "mimicnorm": 2693}),
        Entry("cifar100_shufflenetv2", {"batchnorm": 3915, "mimicnorm": 3141}),
    ),
    "table3": (
        Entry("imagenet_vgg16", {"batchnorm": 62162, "mimicnorm": 56410, "nonorm": 56388}),
        Entry("imagenet_resnet18", {"batchnorm": 8057, "mimicnorm": 5603}),
        Entry(
            "imagenet_resnet50",
            {"batchnorm": 27083, "fixup": 29267, "mimicnorm": 22489},
            more=(*_COMBINED, *_LARGE),
        ),
        Entry("imagenet_resnet101", {"batchnorm": 37168, "mimicnorm": 30363}),
        Entry("imagenet_shufflenetv2_x0_5", {"batchnorm": 4385, "mimicnorm": 3603}),
    ),
}


class Job(NamedTuple):
    """One compilation."""

    config: str
    batch: int
    method: str
    target: str


def jobs_of(table: str) -> list[Job]:
    """What is compiled for a table, in its order."""
    entries = TABLES[table]
    jobs = [Job(e.config, e.batch, m, "cpu") for e in entries for m in _EVERYWHERE]
    jobs += [Job(e.config, e.batch, m, TPU) for e in entries for m in _EVERYWHERE]
    return jobs + [Job(e.config, e.batch, m, TPU) for e in entries for m in e.more]


def compile_job(job: Job) -> Row:
    """The row of a job, compiled for one device: bfloat16 for ImageNet on a TPU, else float32."""
    config = _load(job.config)
    config.batch_size = job.batch
    on_tpu = job.target != "cpu" and job.config.startswith("imagenet")
    config.precision = "bfloat16" if on_tpu else "float32"
    (variant,) = parse_variants(config, [job.method])
    return analyse(variant, job.target, mesh_of(job.target, 1))


def _load(name: str) -> ConfigDict:
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; run this in the project's folder")
    return runpy.run_path(str(path))["get_config"]()


def _compile_all(jobs: Sequence[Job], processes: int) -> Iterable[Row]:
    if processes == 1:
        yield from map(compile_job, jobs)
        return
    # of these processes none uses a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        yield from pool.map(compile_job, jobs)


def write_table(table: str, *, processes: int) -> None:
    """Compiles a table and writes ``results/memory/<table>.{json,png,md}``.

    What has been compiled before is remembered, so that an interrupted table goes on.

    Args:
      table: a name in ``TABLES``.
      processes: how many compilations run at a time, each in some GiB of memory.
    """
    with refused_by_system(f"{RESULTS} cannot be written"):
        RESULTS.mkdir(parents=True, exist_ok=True)
    jobs, rows = jobs_of(table), []
    progress = tqdm(total=len(jobs), desc=table, unit="step")
    for job, row in zip(jobs, _compile_all(jobs, processes), strict=True):
        rows.append(row)
        progress.set_postfix_str(f"{job.config} {job.method} {job.target}")
        progress.update()
    progress.close()
    records = [
        {"config": job.config, **dataclasses.asdict(row)}
        for job, row in zip(jobs, rows, strict=True)
    ]
    (RESULTS / f"{table}.json").write_text(json.dumps(records, indent=1) + "\n")
    by_job = dict(zip(jobs, rows, strict=True))
    (RESULTS / f"{table}.md").write_text(as_markdown(table, by_job))
    groups = {}
    for entry in TABLES[table]:
        shown = [r for j, r in by_job.items() if j.config == entry.config and j.target == TPU]
        title = entry.config.replace("_", "\n", 1) + f"\nbatch {entry.batch}"
        groups[title] = shown
    plot(groups, RESULTS / f"{table}.png")
    print(f"{RESULTS}/{table}.json, .md, .png", file=sys.stderr)


def as_markdown(table: str, rows: dict[Job, Row]) -> str:
    """The table with the paper's column, for each target; and what else was compiled."""
    lines = []
    for target in (TPU, "cpu"):
        lines += [
            f"Compiled for {target}, one device:",
            "",
            "| network, batch | BatchNorm, MiB | MimicNorm, MiB | none, MiB | saved | none saves "
            "| the paper's saving | plain Flax, MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for entry in TABLES[table]:
            peak = {
                method: rows[Job(entry.config, entry.batch, method, target)].peak_bytes
                for method in _EVERYWHERE
            }
            saved = {m: 1 - peak[m] / peak["batchnorm"] for m in ("mimicnorm", "nonorm")}
            papers = 1 - entry.paper["mimicnorm"] / entry.paper["batchnorm"]
            cells = [f"{entry.config}, {entry.batch}"]
            cells += [f"{peak[m] / 2**20:,.0f}" for m in ("batchnorm", "mimicnorm", "nonorm")]
            cells += [f"{100 * saved[m]:.1f} %" for m in ("mimicnorm", "nonorm")]
            cells += [f"{100 * papers:.1f} %", f"{peak['plain'] / 2**20:,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for entry in TABLES[table]:
        if entry.more:
            lines += _more(entry, rows)
    return "\n".join(lines)


def _more(entry: Entry, rows: dict[Job, Row]) -> list[str]:
    lines = [
        f"{entry.config}, batch {entry.batch} unless said otherwise, {TPU}:",
        "",
        "| method | peak, MiB | of BatchNorm's | GFLOP | GiB moved | roofline, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    baseline = rows[Job(entry.config, entry.batch, "batchnorm", TPU)]
    for job, row in rows.items():
        if job.config != entry.config or job.target != TPU:
            continue
        moved = "" if row.bytes_accessed is None else f"{row.bytes_accessed / 2**30:.1f}"
        time = "" if row.roofline_s is None else f"{1000 * row.roofline_s:.0f}"
        cells = [row.method, f"{row.peak_bytes / 2**20:,.0f}"]
        cells += [f"{row.peak_bytes / baseline.peak_bytes:.3f}", f"{row.flops / 1e9:,.0f}"]
        lines.append("| " + " | ".join([*cells, moved, time]) + " |")
    return [*lines, ""]
