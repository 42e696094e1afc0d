"""The speed of the training input, stage by stage."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import jax

from mimicnorm_jax.data.pipeline import Pipeline, prefetch
from mimicnorm_jax.data.random_crop import uniforms
from mimicnorm_jax.data.sources import EncodedSource
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.progress import Throughput

_EXAMPLES = 256  # that are read and decoded again and again


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the input.

    Attributes:
      name: what is timed; each stage but the first and the last two contains those before.
      images_per_second: of wall time.
      images_per_core_second: of processor time, of this process and its threads; None where
        worker processes do the work.
    """

    name: str
    images_per_second: float
    images_per_core_second: float | None


def time_calls(name: str, call: Callable[[], int], seconds: float) -> Stage:
    """Calls a function again and again.

    Args:
      name: of the stage.
      call: works, and returns on how many images.
      seconds: how long, after one call that does not count.
    """
    call()
    images, wall, processor = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - wall) < seconds or not images:
        images += call()
    elapsed = time.perf_counter() - wall
    return Stage(name, images / elapsed, images / (time.process_time() - processor))


def _encoded_stages(pipeline: Pipeline, seconds: float) -> Iterator[Stage]:
    source = pipeline.source
    assert isinstance(source, EncodedSource)
    indices = itertools.cycle(pipeline.indices(0)[:_EXAMPLES].tolist())

    def read() -> int:
        source.read(next(indices))
        return 1

    yield time_calls("read", read, seconds)
    crop = pipeline.crop
    if crop is None:

        def decode() -> int:
            _ = source[next(indices)]
            return 1

        yield time_calls("+ decode, resize, central crop", decode, seconds)
        return
    rows = itertools.cycle(uniforms(0, 0, _EXAMPLES, crop.draws))

    def decode_crop() -> int:
        u = next(rows)
        source.cropped(next(indices), lambda height, width: crop.choose(height, width, u))
        return 1

    yield time_calls("+ decode, random crop, resize", decode_crop, seconds)


def stages(experiment: Experiment, seconds: float) -> Iterator[Stage]:
    """Times the stages of the training input, one after the other.

    Args:
      experiment: whose input it is.
      seconds: how long each stage is timed.
    """
    pipeline = experiment.train_data
    if isinstance(pipeline.source, EncodedSource):
        yield from _encoded_stages(pipeline, seconds)
    steps = itertools.count()

    def batch() -> int:
        return len(pipeline.batch(next(steps))["label"])

    yield time_calls("+ order, batch (one thread)", batch, seconds)
    ahead = prefetch(pipeline.batches(0, 2**31), lambda batch: batch)
    try:
        whole = time_calls("all workers", lambda: len(next(ahead)["label"]), seconds)
    finally:
        ahead.close()
    processes = pipeline.workers.processes and isinstance(pipeline.source, EncodedSource)
    yield dataclasses.replace(whole, images_per_core_second=None) if processes else whole
    on_host = pipeline.batch(0)

    def transfer() -> int:
        jax.block_until_ready(shard_batch(on_host, experiment.mesh))
        return len(on_host["label"])

    yield time_calls("transfer to the devices", transfer, seconds)


def train(experiment: Experiment, steps: int) -> tuple[float, float]:
    """Trains for some steps, as a run does.

    Returns:
      Images per second, and the fraction of the time spent waiting for input.
    """
    throughput = Throughput()
    state = experiment.initial_state()
    ahead = experiment.batches(0, steps + 1)
    state, metrics = experiment.train_step(state, next(ahead))  # compiles
    jax.block_until_ready(metrics)
    throughput.restart()
    for _ in range(steps):
        with throughput.waiting():
            batch = next(ahead)
        state, metrics = experiment.train_step(state, batch)
        jax.block_until_ready(metrics)
        throughput.add(experiment.config.batch_size)
    rate, fraction = throughput.rate(), throughput.wait_fraction
    assert rate is not None
    assert fraction is not None
    return rate, fraction
