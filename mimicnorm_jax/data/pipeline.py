"""Batches as a pure function of (seed, step).

One permutation an epoch, drawn from (seed, epoch), all of them concatenated into one
stream; batch s is the slice [sB, (s+1)B) of it. So every example comes exactly once an
epoch, nothing is dropped, there is no iterator state to save, and neither the number of
processes nor what ran before changes a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import resource_tracker
from typing import TypeVar

import numpy as np
from absl import flags

from mimicnorm_jax.data.random_crop import RandomResizedCrop, uniforms
from mimicnorm_jax.data.sources import ArraySource, EncodedSource, Source

Batch = dict[str, np.ndarray]
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who decodes, where the examples are not in memory.

    Attributes:
      threads: in each process; each makes a whole batch. Decoding leaves Python's lock free.
      processes: beside this one; 0 to decode in this process.
    """

    threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    processes: int = 0


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Only the raw stream of a NumPy bit generator is promised to stay the same from
    # version to version, so the permutation is made from it directly.
    raw = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(raw, kind="stable")


def steps_of(epochs: float, num_examples: int, batch_size: int) -> Fraction:
    """Exactly how many steps ``epochs`` are: N / B each, which is seldom whole.

    With floating-point numbers 150 epochs of 136 / 50 steps would be more than 408.
    """
    return Fraction(epochs).limit_denominator(10**6) * num_examples / batch_size


class Pipeline:
    """Training batches by step.

    Args:
      source: the training split.
      batch_size: B, over all processes.
      seed: decides the order.
      process_index: which part of each batch this process reads.
      process_count: into how many parts a batch is cut.
      crop: random crops of an encoded source; default: the centre, as in evaluation.
      workers: who decodes.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        crop: RandomResizedCrop | None = None,
        workers: Workers = Workers(),
    ):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} does not divide by {process_count} processes"
            )
        if crop is not None and not isinstance(source, EncodedSource):
            raise ValueError("random crops of random size need an encoded source")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.workers = workers
        self._part = slice(
            process_index * batch_size // process_count,
            (process_index + 1) * batch_size // process_count,
        )

    def steps(self, epochs: float) -> Fraction:
        """Exactly how many steps ``epochs`` are."""
        return steps_of(epochs, len(self.source), self.batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Indices ``(B,)`` into the source of the examples of a step."""
        size = len(self.source)
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, positions = np.divmod(stream, size)
        indices = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.seed, int(epoch), size)[positions[here]]
        return indices

    def batch(self, step: int, at_most: int | None = None) -> Batch:
        """This process's part of a step: ``image`` uint8 (b, H, W, C), ``label`` int32 (b,).

        Args:
          step: its number.
          at_most: as many examples only, the first.

        Raises:
          UserError: an image is damaged.
        """
        indices = self.indices(step)[self._part][:at_most]
        if self.crop is None:
            return self._gather(indices)
        u = uniforms(self.seed, step, self.batch_size, self.crop.draws)[self._part][:at_most]
        return _stack([self._cropped(*pair) for pair in zip(indices, u, strict=True)])

    def _cropped(self, index: int, u: np.ndarray) -> tuple[np.ndarray, int]:
        source, crop = self.source, self.crop
        assert crop is not None
        assert isinstance(source, EncodedSource)
        return source.cropped(index, lambda height, width: crop.choose(height, width, u))

    def _gather(self, indices: np.ndarray) -> Batch:
        if isinstance(self.source, ArraySource):
            return {"image": self.source.images[indices], "label": self.source.labels[indices]}
        return _stack([self.source[index] for index in indices])

    def batches(self, start: int, stop: int, *, in_processes: bool = True) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop - 1``, decoded ahead by the workers.

        Args:
          start, stop: of the steps.
          in_processes: False for threads only, since processes take seconds to start.

        Raises:
          UserError: an image is damaged.
          RuntimeError: a worker process died.
        """
        return self._ahead(self.batch, start, stop, in_processes=in_processes)

    def evaluation_batches(self) -> Iterator[Batch]:
        """The source in order, once; the last batch is padded.

        ``mask`` float32 (b,) is 1 for an example and 0 for padding.
        """
        return self._ahead(self._evaluation_batch, 0, -(-len(self.source) // self.batch_size))

    def _evaluation_batch(self, number: int) -> Batch:
        size, whole = len(self.source), self.batch_size
        positions = np.arange(number * whole, (number + 1) * whole)[self._part]
        batch = self._gather(np.minimum(positions, size - 1))
        return batch | {"mask": (positions < size).astype(np.float32)}

    def _ahead(
        self, make: Callable[[int], Batch], start: int, stop: int, *, in_processes: bool = True
    ) -> Iterator[Batch]:
        if not isinstance(self.source, EncodedSource) or start == stop:
            yield from map(make, range(start, stop))
            return
        import grain  # takes a second, and data in memory do not need it

        workers = self.workers
        dataset = grain.MapDataset.range(start, stop).map(make)
        # As many batches are kept as are made at a time: that bounds the memory.
        options = grain.ReadOptions(
            num_threads=workers.threads, prefetch_buffer_size=workers.threads
        )
        iterable = dataset.to_iter_dataset(options)
        if workers.processes and in_processes:
            if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads them
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                num_workers=workers.processes, per_worker_buffer_size=1
            )
            start_silent_resource_tracker()
            iterable = iterable.mp_prefetch(processes, worker_init_fn=_serve_one_parent)
        iterator = iter(iterable)
        try:
            # Copies: a batch in the memory that it came in would hold that memory, of which Python
            # complains when the program ends, for as long as a CPU computes with it.
            for batch in iterator:
                yield {k: v if type(v) is np.ndarray else np.array(v) for k, v in batch.items()}
        finally:
            if hasattr(iterator, "close"):  # older versions of Grain leave it to the collector
                iterator.close()


def start_silent_resource_tracker() -> None:
    """Starts Python's process that takes shared memory back, without an error output.

    Where a run leaves at once, as from a full disk, much is to be taken back: it would tell of each
    piece, with tracebacks of what the workers have taken back themselves.
    """
    if os.name != "posix":
        return
    sys.stderr.flush()
    try:
        ours = os.dup(2)
    except OSError:  # which is closed
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        resource_tracker.ensure_running()
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def _serve_one_parent(index: int, count: int) -> None:
    """Ends with the training process, and not before.

    Ctrl-C and a job's end reach every process, of which the training process ends its workers.
    Where it was killed it cannot: then they would wait for work for ever, with all they hold.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _stack(examples: list[tuple[np.ndarray, int]]) -> Batch:
    images, labels = zip(*examples, strict=True)
    return {"image": np.stack(images), "label": np.array(labels, np.int32)}


def prefetch(
    items: Iterable[S], place: Callable[[S], T], *, depth: int = 2
) -> Generator[T, None, None]:
    """``place(item)`` for every item, ``depth`` of them ahead, in one thread.

    Args:
      items: such as batches; what they raise is raised where the item is taken.
      place: such as the transfer to the devices.
      depth: how many items are kept ready, which bounds the memory.
    """
    remaining = iter(items)

    def take() -> list[T]:
        for item in remaining:
            return [place(item)]
        return []

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: collections.deque[Future[list[T]]] = collections.deque(
            pool.submit(take) for _ in range(depth)
        )
        while item := waiting.popleft().result():
            yield from item
            waiting.append(pool.submit(take))
