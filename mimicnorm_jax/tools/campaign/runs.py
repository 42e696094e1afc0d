"""One run of the campaign, and what it costs: the product's own steps, without checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import jax
from ml_collections import ConfigDict

from mimicnorm_jax.tools.campaign.budget import Cost
from mimicnorm_jax.train import provenance
from mimicnorm_jax.train.evaluation import evaluate, recalibrate
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.metrics import Pending
from mimicnorm_jax.train.progress import Throughput
from mimicnorm_jax.train.state import TrainState, count_parameters

# As far as the training loop lets the host run ahead of the device.
_CALLS_IN_FLIGHT = 2

Record = dict[str, Any]


def with_length(config: ConfigDict, epochs: int, steps_per_call: int) -> ConfigDict:
    """A configuration with another length: its warm-up and milestones keep their place in it.

    Args:
      config: the recipe, as long as it is meant to be.
      epochs: of the run.
      steps_per_call: see ``config.steps_per_call``.
    """
    scale = epochs / config.epochs
    config = copy.deepcopy(config)
    config.schedule.warmup_epochs *= scale
    config.schedule.milestones = tuple(scale * epoch for epoch in config.schedule.milestones)
    config.epochs, config.steps_per_call = float(epochs), steps_per_call
    return config


def calls(experiment: Experiment) -> Iterator[list[Any]]:
    """The batches of each call of the devices; a call ends where an evaluation is due."""
    batches: list[Any] = []
    with closing(experiment.batches(0, experiment.total_steps)) as ahead:
        for step, batch in enumerate(ahead, start=1):
            batches.append(batch)
            if len(batches) == experiment.steps_per_call or experiment.due(step).evaluation:
                yield batches
                batches = []


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a configuration runs.

    Attributes:
      steps_per_call: what the numbers below were measured with.
      images_per_second: of training.
      cost: of a run.
    """

    steps_per_call: int
    images_per_second: float
    cost: Cost


def measure(experiment: Experiment, seconds: float) -> Measured:
    """Does once all that a run does, and times what it would do again and again.

    Args:
      experiment: of some epochs; its programs are compiled.
      seconds: how long training is timed; a whole call of the devices at least.
    """
    began = time.perf_counter()
    size, per_call = experiment.config.batch_size, experiment.steps_per_call
    with closing(experiment.batches(0, 2**31)) as ahead:

        def call(state: TrainState) -> tuple[TrainState, Any]:
            return experiment.train(state, list(itertools.islice(ahead, per_call)))

        state, metrics = call(experiment.initial_state())  # compiles
        state, metrics = jax.block_until_ready(call(state))
        count, start = 0, time.perf_counter()
        in_flight = Pending()
        while time.perf_counter() - start < seconds or not count:
            state, metrics = call(state)
            in_flight.add(count, per_call, metrics)
            if len(in_flight) > _CALLS_IN_FLIGHT:
                list(in_flight.take())
            count += per_call
        jax.block_until_ready(metrics)
        timed = time.perf_counter() - start
    evaluate(experiment, state)  # compiles
    start = time.perf_counter()
    evaluate(experiment, state)
    evaluation = time.perf_counter() - start
    if experiment.network.last_bn is not None:
        recalibrate(experiment, state)
        evaluate(experiment, state)  # with exact statistics, at the end
    whole = time.perf_counter() - began
    epoch = float(experiment.train_data.steps(1)) * timed / count
    cost = Cost(fixed_s=whole - timed - evaluation, epoch_s=epoch + evaluation)
    return Measured(per_call, count * size / timed, cost)


def fastest(
    make: Callable[[int], Experiment], candidates: tuple[int, ...], seconds: float
) -> Measured:
    """The number of steps in a call with which a configuration trains fastest.

    Its costs are those of the candidate that was compiled last: the compiler tries out its
    kernels at the first one, and remembers their choice.

    Args:
      make: the experiment with so many steps in a call.
      candidates: to be tried; devices that do one step only try that.
      seconds: how long each is timed.
    """
    found: dict[int, Measured] = {}
    for candidate in candidates:
        experiment = make(candidate)
        if experiment.steps_per_call not in found:
            found[experiment.steps_per_call] = measure(experiment, seconds)
    best = max(found.values(), key=lambda one: one.images_per_second)
    *_, last = found.values()
    cost = dataclasses.replace(best.cost, fixed_s=last.cost.fixed_s)
    return dataclasses.replace(best, cost=cost)


def train(experiment: Experiment, note: Callable[[Record], None]) -> Record:
    """Trains to the end, or to the first step that is not finite.

    Args:
      experiment: the run.
      note: is given the record so far after each epoch.

    Returns:
      The record: configuration, accuracies in [0, 1], speed, versions, machine.
    """
    config, began = experiment.config, time.monotonic()
    state, throughput = experiment.initial_state(), Throughput()
    in_flight = Pending(config.optimizer.label_smoothing)
    rows: list[dict[str, float]] = []
    curve: list[Record] = []
    record: Record = _origin(experiment) | {
        "num_parameters": count_parameters(state.params),
        "curve": curve,
        "finished": False,
    }

    def settle(left: int) -> None:
        """Waits until no more than so many calls are in flight."""
        while len(in_flight) > left:
            for at, row in in_flight.take():
                if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
                    record["diverged_at_step"] = min(at, record.get("diverged_at_step", at))
                rows.append(row)

    step = 0
    for batches in calls(experiment):
        state, metrics = experiment.train(state, batches)
        in_flight.add(step + 1, len(batches), metrics)
        step += len(batches)
        settle(_CALLS_IN_FLIGHT if step > len(batches) else 0)
        if step == len(batches):
            record["first_call_s"] = throughput.restart()  # mostly compilation
        else:
            throughput.add(len(batches) * config.batch_size)
        due = experiment.due(step).evaluation
        if due:
            settle(0)
        if "diverged_at_step" in record:
            break
        if due:
            throughput.rate()  # before the evaluation, which is no training
            with throughput.paused():
                curve.append(_point(experiment, state, step, rows))
                rows.clear()
                record |= {"steps": step, "seconds": time.monotonic() - began}
                note(record | _result(curve, throughput))
    if curve and "diverged_at_step" not in record and experiment.network.last_bn is not None:
        exact = evaluate(experiment, recalibrate(experiment, state))["test_accuracy"]
        record["final_test_accuracy_recalibrated"] = exact
    record |= {"steps": step, "seconds": time.monotonic() - began, "finished": True}
    result = _result(curve, throughput)
    if "diverged_at_step" in record:
        result["final_test_accuracy"] = None  # the last point is from before
    return record | result


def _point(
    experiment: Experiment, state: TrainState, step: int, rows: list[dict[str, float]]
) -> Record:
    """A point of the curve: the steps since the last one, and an evaluation."""
    return {
        "step": step,
        "epoch": float(step / experiment.train_data.steps(1)),
        "train_loss": sum(row["loss"] for row in rows) / len(rows),
        "train_accuracy": sum(row["correct"] for row in rows)
        / (len(rows) * experiment.config.batch_size),
        "learning_rate": rows[-1]["learning_rate"],
    } | evaluate(experiment, state)


def _result(curve: list[Record], throughput: Throughput) -> Record:
    """What the curve comes to; null where a run diverged within its first epoch."""
    accuracies = [point["test_accuracy"] for point in curve]
    return {
        "final_test_accuracy": accuracies[-1] if accuracies else None,
        "best_test_accuracy": max(accuracies, default=None),
        "images_per_second": throughput.total_rate(),
    }


def _origin(experiment: Experiment) -> Record:
    """What a run is, and what it is made with."""
    config = experiment.config
    return {
        "network": config.network,
        "method": config.method,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps_per_call": experiment.steps_per_call,
        "schedule": "the recipe's, warm-up and milestones scaled to this length",
        "final_test_accuracy_recalibrated": None,
        "config": provenance.config_as_json(config),
        "versions": provenance.versions(),
        **provenance.hardware(experiment.mesh),
        **provenance.code(),
    }
