"""How fast a configuration trains, reads and infers, how soon it starts, what checkpoints cost.

python -m mimicnorm_jax.tools.benchmark step --config configs/cifar100_resnet18.py --batch=64
python -m mimicnorm_jax.tools.benchmark input --config configs/cifar100_vgg16.py
python -m mimicnorm_jax.tools.benchmark inference --config configs/cifar100_vgg16.py --batch=1
python -m mimicnorm_jax.tools.benchmark startup --config configs/digits_resnet20.py
python -m mimicnorm_jax.tools.benchmark checkpoint --config configs/cifar10_folder_resnet20.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mimicnorm_jax import command_line
from mimicnorm_jax.errors import refused_by_system
from mimicnorm_jax.parallel import make_mesh
from mimicnorm_jax.precision import resolve_precision
from mimicnorm_jax.tools.benchmark import inference, step, torch_networks, torch_step
from mimicnorm_jax.tools.benchmark.input import stages, train
from mimicnorm_jax.tools.benchmark.runs import checkpoint_cost, time_startup
from mimicnorm_jax.tools.benchmark.step import Speed, Timed, compare, prepare
from mimicnorm_jax.tools.report import (
    BATCH,
    COMPARED,
    JSON,
    NUM_CLASSES,
    PLOT,
    check_output,
    write_json,
)
from mimicnorm_jax.tools.variants import Variant, parse_variants
from mimicnorm_jax.train.setup import configure_jax, set_up, silence_false_alarms

for _name in ("batch", "methods", "json", "num-classes", "plot"):  # shown by --help
    flags.declare_key_flag(_name)

_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long each stage, or a turn, is timed.", 0.01)
_STEPS = flags.DEFINE_integer("steps", 20, "Training steps to time; 0 leaves them out (input).", 0)

_REPEATS = flags.DEFINE_integer("repeats", 3, "startup: starts with a warm cache.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "step, inference: how often each gets its turn.", 1)
_PAIRS = flags.DEFINE_integer("pairs", 12, "checkpoint: pairs of segments of --steps steps.", 2)


def _input() -> None:
    check_output("json", JSON.value, (".json",))
    experiment = set_up(command_line.config())
    source, shape = experiment.train_data.source, experiment.train_data.source.image_shape
    print(f"{len(source)} images, batches of {experiment.config.batch_size} x {shape}", flush=True)
    print(f"{'stage':<34}{'images/s':>12}{'per core':>12}", flush=True)
    measured = []
    for stage in stages(experiment, _SECONDS.value):
        measured.append(stage)
        core = stage.images_per_core_second
        core_cell = "" if core is None else f"{core:.0f}"
        print(f"{stage.name:<34}{stage.images_per_second:>12.0f}{core_cell:>12}", flush=True)
    report = {
        "config": command_line.config_path(),
        "cores": os.cpu_count(),
        "device": experiment.mesh.devices.flat[0].device_kind,
        "stages": [dataclasses.asdict(stage) for stage in measured],
    }
    if _STEPS.value:
        print("compiling the training step …", flush=True)
        rate, fraction = train(experiment, _STEPS.value)
        print(f"{'training':<34}{rate:>12.0f}\ninput_wait_fraction {np.round(fraction, 4)}")
        report |= {"training_images_per_second": rate, "input_wait_fraction": fraction}
    write_json(json.dumps(report, indent=2) + "\n")


def _in_torch(label: str) -> bool:
    return label.startswith(torch_networks.PREFIX)


def _variants(config: ConfigDict, labels: Sequence[str]) -> list[Variant]:
    """What each label names, be it for JAX or for PyTorch."""
    names = [label.removeprefix(torch_networks.PREFIX) for label in labels]
    known = {variant.label: variant for variant in parse_variants(config, names)}
    for label, name in zip(labels, names, strict=True):
        if _in_torch(label):
            torch_step.check_variant(known[name])
    return [known[name] for name in names]


def _record(speed: Speed, timed: Timed) -> dict[str, Any]:
    record = dataclasses.asdict(speed)
    if isinstance(timed, torch_step.TorchStep):
        record |= {"compiled": timed.compiled, "allocator_peak_bytes": timed.peak_bytes()}
    return record


def _step() -> None:
    check_output("json", JSON.value, (".json",))
    check_output("plot", PLOT.value, (".png", ".pdf", ".svg"))
    config = command_line.config()
    if BATCH.value is not None:
        config.batch_size = BATCH.value
    configure_jax(config)
    chosen = ["batchnorm", "mimicnorm", "nonorm"] if COMPARED.value is None else COMPARED.value
    labels = list(dict.fromkeys(chosen))
    variants = _variants(config, labels)
    mesh = make_mesh(config.num_devices)
    silence_false_alarms(mesh)
    device = mesh.devices.flat[0].device_kind
    title = f"{config.network}, {config.data.image_size} pixels, {mesh.size} x {device}"
    print(f"{title}\ncompiling {len(variants)} training steps …", flush=True)
    timed = []
    for label, variant in zip(labels, variants, strict=True):
        make = torch_step.prepare_variant if _in_torch(label) else prepare
        timed.append(make(variant, mesh, NUM_CLASSES.value))
        print(f"{label}: compiled in {timed[-1].compile_s:.1f} s", flush=True)
    speeds = compare(
        labels,
        timed,
        [variant.config.batch_size for variant in variants],
        rounds=_ROUNDS.value,
        seconds=_SECONDS.value,
        device_kind=device,
    )
    print(step.HEADER)
    for speed in speeds:
        print(step.line(speed))
    report = {
        "config": command_line.config_path(),
        "batch": config.batch_size,
        "precision": resolve_precision(variants[0].config.precision).dtype.name,
        "cores": os.cpu_count(),
        "device": device,
        "num_devices": mesh.size,
        "rounds": _ROUNDS.value,
        "methods": [_record(*pair) for pair in zip(speeds, timed, strict=True)],
    }
    write_json(json.dumps(report, indent=2) + "\n")
    if PLOT.value:
        with refused_by_system(f"--plot={PLOT.value} cannot be written"):
            step.plot(speeds, pathlib.Path(PLOT.value), title)
        print(f"picture: {PLOT.value}")


def _inference() -> None:
    check_output("json", JSON.value, (".json",))
    config = inference.prepared_config(command_line.config())
    configure_jax(config)
    with inference.one_core(), jax.default_device(jax.devices("cpu")[0]):
        network = inference.create(config, NUM_CLASSES.value)
        size, cores = config.data.image_size, os.cpu_count()
        print(f"{config.network}, {size} pixels, 1 core of {cores}", flush=True)
        batches = inference.BATCHES if BATCH.value is None else (BATCH.value,)
        measured = [_infer(network, batch) for batch in batches]
    report = {
        "config": command_line.config_path(),
        "network": config.network,
        "image_size": size,
        "precision": config.precision,
        "cores": 1,
        "rounds": _ROUNDS.value,
        "versions": inference.versions(),
        "batches": measured,
    }
    write_json(json.dumps(report, indent=2) + "\n")


def _infer(network: inference.Network, batch: int) -> dict[str, Any]:
    print(f"batch {batch}: compiling {len(inference.RIVALS)} rivals …", flush=True)
    prepared = inference.prepare(network, batch)
    for reason in dict.fromkeys(prepared.left_out.values()):
        labels = [label for label, why in prepared.left_out.items() if why == reason]
        print(f"without {', '.join(labels)}: {reason}")
    speeds = compare(
        list(prepared.timed),
        list(prepared.timed.values()),
        [batch] * len(prepared.timed),
        rounds=_ROUNDS.value,
        seconds=_SECONDS.value,
        device_kind="cpu",
    )
    print(step.HEADER)
    rows = []
    for speed in speeds:
        print(step.line(speed), flush=True)
        rows.append(
            dataclasses.asdict(speed) | {"logits_difference": prepared.differences[speed.method]}
        )
    return {"batch": batch, "methods": rows, "left_out": prepared.left_out}


def _startup() -> None:
    check_output("json", JSON.value, (".json",))
    arguments = [f"--config={command_line.config_path()}", *command_line.overrides()]
    with tempfile.TemporaryDirectory() as folder:
        cache, seconds = pathlib.Path(folder) / "cache", []
        for repeat in range(1 + _REPEATS.value):
            seconds.append(time_startup(arguments, pathlib.Path(folder) / str(repeat), cache))
            kind = "warm" if repeat else "empty"
            print(f"first step after {seconds[-1]:.1f} s ({kind} compilation cache)", flush=True)
    cold, *warm = seconds
    print(f"warm: median {statistics.median(warm):.1f} s, at most {max(warm):.1f} s")
    report = {"config": command_line.config_path(), "cores": os.cpu_count()}
    write_json(json.dumps(report | {"empty_cache_s": cold, "warm_s": warm}, indent=2) + "\n")


def _checkpoint_cost() -> None:
    check_output("json", JSON.value, (".json",))
    experiment = set_up(command_line.config())
    print("training with and without a checkpoint in turn …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cost = checkpoint_cost(
            experiment, pathlib.Path(folder), pairs=_PAIRS.value, steps=max(1, _STEPS.value)
        )
    low, high = cost.extra_quartiles_s
    print(
        f"a checkpoint blocks the loop for {1000 * cost.blocked_s:.0f} ms and makes {_STEPS.value} "
        f"steps {1000 * cost.extra_s:.0f} ms longer (quartiles {1000 * low:.0f}, "
        f"{1000 * high:.0f}); an epoch takes {cost.epoch_s:.1f} s\n"
        f"one an epoch costs {100 * cost.share:.2f} %"
    )
    report = {
        "config": command_line.config_path(),
        "cores": os.cpu_count(),
        "device": experiment.mesh.devices.flat[0].device_kind,
    }
    write_json(json.dumps(report | dataclasses.asdict(cost), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    programs = {"input": _input, "step": _step, "inference": _inference}
    programs |= {"startup": _startup, "checkpoint": _checkpoint_cost}
    return command_line.run_program(programs, argv=argv)


if __name__ == "__main__":
    main()
