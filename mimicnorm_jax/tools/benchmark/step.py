"""The speed of the training step, variants side by side in one interleaved run."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.memory.allocator import random_batch
from mimicnorm_jax.tools.memory.chips import chip_of
from mimicnorm_jax.tools.memory.compiled import is_counted, program_of, unoptimized_flops
from mimicnorm_jax.tools.variants import Variant

Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast one variant trains.

    Attributes:
      method: what is timed.
      images_per_second: median over the rounds, and its quartiles.
      ratio: of its speed to that of the first variant in the same round; median and quartiles.
      compile_s: seconds to compile.
      flops: operations of a step on a device, by the compiler; 0 where nobody counted.
      achieved_flops: operations a second on a device.
      of_peak: these as a part of what the chip's data sheet says; None where that is unknown.
    """

    method: str
    images_per_second: float
    images_per_second_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    compile_s: float
    flops: float
    achieved_flops: float
    of_peak: float | None


class Timed:
    """A step that is compiled and warm.

    Args:
      call: one step; returns what to wait for.
      compile_s: seconds that compilation took.
      flops: operations of a step.
    """

    def __init__(self, call: Step, compile_s: float, flops: float):
        self._call = call
        self.compile_s = compile_s
        self.flops = flops

    def seconds(self, steps: int) -> float:
        """Wall time of some steps, of which the device never waits for the host."""
        began = time.perf_counter()
        for _ in range(steps):
            result = self._call()
        jax.block_until_ready(result)
        return time.perf_counter() - began


def prepare(variant: Variant, mesh: Mesh, num_classes: int | None = None) -> Timed:
    """Compiles the training step of a variant, and runs it twice on random images."""
    program = program_of(variant, mesh, num_classes)
    state, batch = program.initial_state(), random_batch(program, num_classes)
    began = time.perf_counter()
    step = program.train_step.lower(state, batch).compile()
    seconds = time.perf_counter() - began
    if is_counted(program.config, mesh.devices.flat[0].platform):
        flops = (step.cost_analysis() or {}).get("flops", 0.0)
    else:
        flops = unoptimized_flops(variant, num_classes) / mesh.size

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    timed = Timed(call, seconds, flops)
    timed.seconds(2)
    return timed


def interleave(
    timed: Sequence[Any], *, rounds: int, seconds: float, clock: Callable[[Any, int], float]
) -> list[list[float]]:
    """Seconds of a step in each round, for each of several programs in turn.

    Args:
      timed: the programs.
      rounds: how often each gets its turn; every other round goes backwards.
      seconds: about how long a turn is.
      clock: seconds of a number of steps of one of them.
    """
    steps = [max(1, round(seconds / clock(one, 1))) for one in timed]
    found: list[list[float]] = [[] for _ in timed]
    for turn in progress_bar(range(rounds), "rounds"):
        order = range(len(timed)) if turn % 2 == 0 else reversed(range(len(timed)))
        for index in order:
            found[index].append(clock(timed[index], steps[index]) / steps[index])
    return found


def _spread(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles."""
    if len(values) == 1:
        return values[0], (values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


def compare(
    labels: Sequence[str],
    timed: Sequence[Timed],
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    device_kind: str,
) -> list[Speed]:
    """Times programs in turn; ratios are to the first of them, round by round."""
    found = interleave(timed, rounds=rounds, seconds=seconds, clock=lambda one, n: one.seconds(n))
    chip = chip_of(device_kind)
    rates = [[size / s for s in of_one] for size, of_one in zip(batch_sizes, found, strict=True)]
    speeds = []
    for label, one, of_one, times in zip(labels, timed, rates, found, strict=True):
        rate, rate_quartiles = _spread(of_one)
        ratio, ratio_quartiles = _spread([a / b for a, b in zip(of_one, rates[0], strict=True)])
        achieved = one.flops / statistics.median(times)
        speeds.append(
            Speed(
                method=label,
                images_per_second=rate,
                images_per_second_quartiles=rate_quartiles,
                ratio=ratio,
                ratio_quartiles=ratio_quartiles,
                compile_s=one.compile_s,
                flops=one.flops,
                achieved_flops=achieved,
                of_peak=achieved / chip.flops if chip and one.flops else None,
            )
        )
    return speeds


HEADER = (
    f"{'method':<34}{'images/s':>10}{'ratio':>8}{'quartiles':>16}{'compile':>10}{'GFLOP/s':>10}"
)


def line(speed: Speed) -> str:
    """A row for people."""
    low, high = speed.ratio_quartiles
    peak = "" if speed.of_peak is None else f" {100 * speed.of_peak:.0f} % of the chip's"
    return (
        f"{speed.method:<34}{speed.images_per_second:>10.1f}{speed.ratio:>8.3f}"
        f"{f'{low:.3f} {high:.3f}':>16}{f'{speed.compile_s:.1f} s':>10}"
        f"{speed.achieved_flops / 1e9:>10.0f}{peak}"
    )


def plot(speeds: Sequence[Speed], path: pathlib.Path, title: str) -> None:
    """Bars of images a second, with quartiles.

    Args:
      speeds: what was measured.
      path: ``.png``, ``.svg`` or ``.pdf``.
      title: above the picture.
    """
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    names = [speed.method for speed in speeds]
    rates = [speed.images_per_second for speed in speeds]
    low, high = zip(*(speed.images_per_second_quartiles for speed in speeds), strict=True)
    errors = [
        [rate - bound for rate, bound in zip(rates, low, strict=True)],
        [bound - rate for rate, bound in zip(rates, high, strict=True)],
    ]
    axes.barh(names, rates, xerr=errors, color="#4477aa", capsize=3)
    for index, speed in enumerate(speeds):
        axes.text(0, index, f"  {speed.ratio:.2f}", va="center", color="white")
    axes.invert_yaxis()
    axes.set_xlabel("images/s (white: relative to the first; lines: quartiles of the rounds)")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
