"""What a run says of itself when it starts, goes on, or has nothing left to do."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from mimicnorm_jax.config import flatten
from mimicnorm_jax.data.sources import EncodedSource, Source
from mimicnorm_jax.layers import last_bn_loss_floor
from mimicnorm_jax.layers.loss_floor import expected_loss_floor
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.pretrained import Pretrained, Start
from mimicnorm_jax.train.provenance import differences, hardware
from mimicnorm_jax.train.workdir import Summary

_MUCH_ABOVE = 0.25  # nats
_CLASSES_SHOWN = 12
_UNEVEN = 10  # times as many images
_AS_PRINTED = 5e-4  # means in three digits are the same


def introduce(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Prints the network, the configuration and where things go."""
    config = experiment.config
    print(
        parameter_overview.get_parameter_overview(
            experiment.abstract_state.params, include_stats=False
        )
    )
    print("\n".join(f"config.{name} = {value!r}" for name, value in flatten(config).items()))
    device = experiment.mesh.devices.flat[0]
    print(
        f"{config.network} with {config.method} on {experiment.mesh.size} "
        f"{device.device_kind} device(s): {_counts(experiment)}, {experiment.total_steps} steps\n"
        f"everything goes to {workdir}",
        flush=True,
    )
    if line := classes(experiment.train_data.source):
        print(line, flush=True)
    if config.batch_size > (count := len(experiment.splits.train)):
        print(
            f"NOTE: a batch of {config.batch_size} takes all {count} training images, and some of "
            "them again: a step is more than an epoch; smaller ones: --config.batch_size=32",
            flush=True,
        )
    if experiment.start is not None:
        assert experiment.pretrained is not None
        print(starts_from(config, experiment.start, experiment.pretrained), flush=True)
    if experiment.network.last_bn is not None:
        print(loss_floor(config, len(experiment.train_data.source.class_names)), flush=True)
    if config.optimizer.ema_decay and jax.tree.leaves(experiment.abstract_state.batch_stats):
        print(
            "averaged parameters are evaluated, with statistics estimated on "
            f"{config.optimizer.ema_batches} training batches each time",
            flush=True,
        )


def classes(train: Source) -> str:
    """The classes in the order of the logits, and how many images each has; empty if unknown."""
    if isinstance(train, EncodedSource) and not train.knows_labels:
        return ""
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    named = [f"{name} {count}" for name, count in zip(train.class_names, counts, strict=True)]
    few, many = int(counts.argmin()), int(counts.argmax())
    if len(named) > _CLASSES_SHOWN:
        spread = named[few] if counts[few] == counts[many] else f"{named[few]} to {named[many]}"
        named = [*named[:2], "…", named[-1] + f" ({len(counts)} classes, {spread} images)"]
    line = f"classes, in the order of the logits, and their training images: {', '.join(named)}"
    times = counts[many] / max(1, counts[few])
    if times < _UNEVEN:
        return line
    return (
        f"{line}\nNOTE: {train.class_names[many]} has {times:.0f} times as many images as "
        f"{train.class_names[few]}: accuracy counts images, not classes"
    )


def starts_from(config: ConfigDict, start: Start, pretrained: Pretrained) -> str:
    """What of the pretrained weights a run starts with, and how its images are normalized."""
    line = f"starts from {config.init_from}: {start.said}"
    here, there = (config.data.mean, config.data.std), (pretrained.mean, pretrained.std)
    if not config.data.mean or np.allclose(here, there, rtol=0, atol=_AS_PRINTED):
        return f"{line}; images normalized as for these weights"
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in there)
    return (
        f"{line}\nNOTE: images are normalized by config.data.mean and std, not as for these "
        f"weights ({mean}; {std}); for that: --config.data.mean='()' --config.data.std='()'"
    )


def _counts(experiment: Experiment) -> str:
    splits = experiment.splits
    line = f"{len(splits.train)} training and {len(splits.test or ())} test images"
    return line if splits.holdout is None else f"{line}, {len(splits.holdout)} held out"


def loss_floor(config: ConfigDict, num_classes: int) -> str:
    """Below what the last BN does not let the training loss, and what could be done."""
    smoothing, batch = config.optimizer.label_smoothing, config.batch_size
    floor = expected_loss_floor(
        num_classes=num_classes, batch_size=batch, label_smoothing=smoothing
    )
    least = last_bn_loss_floor([1] * num_classes, label_smoothing=smoothing)
    line = (
        f"the last BN keeps the training loss above {floor:.2g} on average, however well the "
        f"network learns: batches of {batch}, {num_classes} equally frequent classes"
    )
    if floor <= least + _MUCH_ABOVE:
        return line
    line += f" (with ever larger ones {least:.2g})"
    if batch == 2:
        line += "; with 2 examples its outputs are +1 and -1, whatever goes in, and nothing learns"
    return (
        f"WARNING: {line}; raise config.batch_size, and config.micro_batches where memory is short"
    )


CHANGED = (
    "WARNING: config.json is not what this checkpoint was made with: it was edited, or another "
    "version of mimicnorm-jax wrote it"
)


def remedy(differing: Sequence[str]) -> str:
    """What takes back a difference, in brackets; of differences in words."""
    threads = any(line.startswith("threads ") for line in differing)
    return " (config.cpu_threads sets them)" if threads else ""


def resumed(experiment: Experiment, step: int, before: dict[str, Any]) -> str:
    """From which step the run goes on, and what is no longer as it was.

    Args:
      experiment: the run.
      step: of its checkpoint.
      before: the ``hardware`` that wrote it.
    """
    config, now = experiment.config, hardware(experiment.mesh)
    line = f"resumed from the checkpoint of step {step}"
    if all(before[name] == now[name] for name in ("num_devices", "num_processes")):
        if differing := differences(before, now):
            line += (
                f"\nNOTE: it computes otherwise than what saved it ({'; '.join(differing)}"
                f"{remedy(differing)}): the bits may differ from those of a run that was not "
                "interrupted"
            )
        return line
    line += (
        f", saved by {before['num_processes']} process(es) with {before['num_devices']} "
        "device(s): the same run, but not bit for bit"
    )
    if experiment.depends_on_devices:
        line += (
            f"\nWARNING: {config.method} normalizes per device: from now on over "
            f"{config.batch_size // now['num_devices']} examples, not "
            f"{config.batch_size // before['num_devices']}"
        )
    return line


def evaluated(epoch: float, found: dict[str, float], best: float | None) -> str:
    """The results of an evaluation, and the test accuracy of the best one so far."""
    line = f"epoch {epoch:.2f}:"
    if best is not None:
        line += f" test_accuracy {100 * found['test_accuracy']:.2f}%"
        line += f" test_loss {found['test_loss']:.4f}"
    if "holdout_accuracy" not in found:
        return f"{line} (best {100 * (best or 0):.2f}%)"
    line += f" holdout_accuracy {100 * found['holdout_accuracy']:.2f}%"
    if best is None:
        return f"{line} holdout_loss {found['holdout_loss']:.4f}"
    return f"{line} (best by the images held out: test {100 * best:.2f}%)"


def finished(summary: Summary, workdir: pathlib.Path) -> str:
    """The result, and where to look at it."""
    split = "holdout" if summary["final_test_accuracy"] is None else "test"
    lines = [
        f"final_{split}_accuracy {summary[f'final_{split}_accuracy']:.4f} "
        f"best_{split}_accuracy {summary[f'best_{split}_accuracy']:.4f} "
        f"after {summary['steps']} steps, {summary['seconds']:.0f} s",
        f"curves: {workdir / 'curves.png'}",
        f"summary: {workdir / 'summary.json'}",
    ]
    if (exact := summary[f"final_{split}_accuracy_recalibrated"]) is not None:
        lines.insert(1, f"with exact last-BN statistics: {exact:.4f}")
    if (calibration := summary["calibration"]) is not None:
        lines.insert(1, calibrated(calibration))
    return "\n".join(lines)


def calibrated(calibration: dict[str, Any]) -> str:
    """What a temperature does to the probabilities."""
    before, after = calibration["before"], calibration["after"]
    return (
        f"probabilities at temperature {calibration['temperature']:.3g}, from "
        f"{calibration['examples']} images held out, where it takes the calibration error from "
        f"{100 * before['calibration_error']:.1f} to {100 * after['calibration_error']:.1f} % and "
        f"the negative log-likelihood from {before['loss']:.4f} to {after['loss']:.4f}"
    )


def say_finished(summary: Summary, workdir: pathlib.Path) -> None:
    """Tells that there is nothing left to do."""
    split = "holdout" if summary["final_test_accuracy"] is None else "test"
    print(
        f"{workdir} is finished: final_{split}_accuracy "
        f"{summary[f'final_{split}_accuracy']:.4f} after "
        f"{summary['steps']} steps; delete it or choose another --workdir to run again"
    )
