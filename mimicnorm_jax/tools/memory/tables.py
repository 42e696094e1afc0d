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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mimicnorm_jax.config.packaged import config_files
from mimicnorm_jax.errors import refused_by_system
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.memory.compiled import Row, analyse
from mimicnorm_jax.tools.memory.plot import plot
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.variants import PLAIN, parse_variants

RESULTS = pathlib.Path("results", "memory")
TPU = "tpu:v5e:2x2"
_MAIN = ("batchnorm", "mimicnorm", "nonorm")


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
    batch: int = 256  # that of the paper's memory column, on one device
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
    """What is compiled for a table, the most telling first."""
    entries = TABLES[table]
    jobs = [Job(e.config, e.batch, m, "cpu") for e in entries for m in (*_MAIN, PLAIN)]
    jobs += [Job(e.config, e.batch, m, TPU) for e in entries for m in _MAIN]
    jobs += [Job(e.config, e.batch, m, TPU) for e in entries for m in e.more]
    return jobs + [Job(e.config, e.batch, PLAIN, TPU) for e in entries]


def compile_job(job: Job, known: dict[str, dict[str, Any]]) -> Row:
    """The row of a job, compiled for one device: bfloat16 for ImageNet on a TPU, else float32.

    Args:
      job: what to compile.
      known: rows that need not be compiled again.
    """
    config = _load(job.config)
    config.batch_size = job.batch
    on_tpu = job.target != "cpu" and job.config.startswith("imagenet")
    config.precision = "bfloat16" if on_tpu else "float32"
    (variant,) = parse_variants(config, [job.method])
    return analyse(variant, job.target, mesh_of(job.target, 1), known=known)


def _load(name: str) -> ConfigDict:
    return runpy.run_path(str(config_files()[name]))["get_config"]()


def _compile_all(
    jobs: Sequence[Job], known: dict[str, dict[str, Any]], processes: int
) -> Iterator[tuple[Job, Row]]:
    """Rows as they come to be done."""
    if processes == 1:
        yield from ((job, compile_job(job, known)) for job in jobs)
        return
    # of these processes none uses a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        waiting = {pool.submit(compile_job, job, known): job for job in jobs}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


def write_table(table: str, *, processes: int) -> None:
    """Compiles a table and writes ``results/memory/<table>.{json,png,md}`` after every row.

    What has been compiled before, here or by who wrote that file, is remembered, so that an
    interrupted table goes on.

    Args:
      table: a name in ``TABLES``.
      processes: how many compilations run at a time, each in some GiB of memory.
    """
    with refused_by_system(f"{RESULTS} cannot be written"):
        RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{table}.json"
    known: dict[str, dict[str, Any]] = {}
    if path.is_file():
        known = {record["program"]: record for record in json.loads(path.read_text())}
    jobs, rows = jobs_of(table), {}
    progress = progress_bar(None, table, len(jobs))
    for job, row in _compile_all(jobs, known, processes):
        rows[job] = row
        progress.set_postfix_str(f"{job.config} {job.method} {job.target}")
        progress.update()
        _write(table, {job: rows[job] for job in jobs if job in rows}, known, path)
    progress.close()
    print(f"{RESULTS}/{table}.json, .md, .png", file=sys.stderr)


def _write(
    table: str, rows: dict[Job, Row], known: dict[str, dict[str, Any]], path: pathlib.Path
) -> None:
    """Writes the rows that are done; what is known from before stays until all are."""
    records = [{"config": job.config, **dataclasses.asdict(row)} for job, row in rows.items()]
    if len(rows) < len(jobs_of(table)):
        done = {record["program"] for record in records}
        records += [record for digest, record in known.items() if digest not in done]
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(records, indent=1) + "\n")
    draft.replace(path)
    path.with_suffix(".md").write_text(as_markdown(table, rows))
    groups = {}
    for entry in TABLES[table]:
        title = entry.config.replace("_", "\n", 1) + f"\nbatch {entry.batch}"
        groups[title] = [
            row for job, row in rows.items() if job.config == entry.config and job.target == TPU
        ]
    groups = {title: of_one for title, of_one in groups.items() if of_one}
    if groups:
        plot(groups, path.with_suffix(".png"))


_HEAD = (
    "| network, batch | BatchNorm, MiB | MimicNorm, MiB | none, MiB | plain Flax, MiB | saved "
    "| none saves | the paper's saving |\n|" + " --- |" * 8
)


def as_markdown(table: str, rows: dict[Job, Row]) -> str:
    """The table with the paper's column, for each target; and what else was compiled."""
    lines = []
    for target in (TPU, "cpu"):
        lines += [f"Compiled for {target}, one device:", "", _HEAD]
        for entry in TABLES[table]:
            peak = {
                job.method: row.peak_bytes
                for job, row in rows.items()
                if job.config == entry.config and job.target == target
            }
            if "batchnorm" not in peak:
                continue
            papers = 1 - entry.paper["mimicnorm"] / entry.paper["batchnorm"]
            cells = [f"{entry.config}, {entry.batch}"]
            cells += [f"{peak[m] / 2**20:,.0f}" if m in peak else "" for m in (*_MAIN, PLAIN)]
            cells += [
                f"{100 * (1 - peak[m] / peak['batchnorm']):.1f} %" if m in peak else ""
                for m in _MAIN[1:]
            ]
            lines.append("| " + " | ".join([*cells, f"{100 * papers:.1f} %"]) + " |")
        lines.append("")
    for entry in TABLES[table]:
        if any(job.config == entry.config and job.method in entry.more for job in rows):
            lines += _more(entry, rows)
    return "\n".join(lines)


def _more(entry: Entry, rows: dict[Job, Row]) -> list[str]:
    lines = [
        f"{entry.config}, batch {entry.batch} unless said otherwise, {TPU}:",
        "",
        "| method | peak, MiB | of BatchNorm's | GFLOP | GiB moved | roofline, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    baseline = rows.get(Job(entry.config, entry.batch, "batchnorm", TPU))
    for job, row in rows.items():
        if job.config != entry.config or job.target != TPU:
            continue
        moved = "" if row.bytes_accessed is None else f"{row.bytes_accessed / 2**30:.1f}"
        time = "" if row.roofline_s is None else f"{1000 * row.roofline_s:.0f}"
        ratio = "" if baseline is None else f"{row.peak_bytes / baseline.peak_bytes:.3f}"
        cells = [row.method, f"{row.peak_bytes / 2**20:,.0f}", ratio, f"{row.flops / 1e9:,.0f}"]
        lines.append("| " + " | ".join([*cells, moved, time]) + " |")
    return [*lines, ""]
