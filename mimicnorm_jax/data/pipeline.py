"""Batches as a pure function of (seed, step).

One permutation an epoch, drawn from (seed, epoch), all of them concatenated into one
stream; batch s is the slice [sB, (s+1)B) of it. So every example comes exactly once an
epoch, nothing is dropped, there is no iterator state to save, and neither the number of
processes nor what ran before changes a batch.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from mimicnorm_jax.data.sources import ArraySource, Source

Batch = dict[str, np.ndarray]
T = TypeVar("T")


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Only the raw stream of a NumPy bit generator is promised to stay the same from
    # version to version, so the permutation is made from it directly.
    raw = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(raw, kind="stable")


class Pipeline:
    """Training batches by step.

    Args:
      source: the training split.
      batch_size: B, over all processes.
      seed: decides the order.
      process_index: which part of each batch this process reads.
      process_count: into how many parts a batch is cut.
      workers: decoding threads, where the source is not in memory.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 8,
    ):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} does not divide by {process_count} processes"
            )
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self._part = slice(
            process_index * batch_size // process_count,
            (process_index + 1) * batch_size // process_count,
        )
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def steps(self, epochs: float) -> Fraction:
        """Exactly how many steps ``epochs`` are: N / B each, which is seldom whole.

        With floating-point numbers 150 epochs of 136 / 50 steps would be more than 408.
        """
        return Fraction(epochs).limit_denominator(10**6) * len(self.source) / self.batch_size

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

    def batch(self, step: int) -> Batch:
        """This process's part of a step: ``image`` uint8 (b, H, W, C), ``label`` int32 (b,)."""
        return self._gather(self.indices(step)[self._part])

    def _gather(self, indices: np.ndarray) -> Batch:
        if isinstance(self.source, ArraySource):
            return {"image": self.source.images[indices], "label": self.source.labels[indices]}
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers)
        examples = list(self._pool.map(self.source.__getitem__, indices))
        images, labels = zip(*examples, strict=True)
        return {"image": np.stack(images), "label": np.array(labels, np.int32)}

    def evaluation_batches(self) -> Iterator[Batch]:
        """The source in order, once; the last batch is padded.

        ``mask`` float32 (b,) is 1 for an example and 0 for padding.
        """
        size, whole = len(self.source), self.batch_size
        for start in range(0, size, whole):
            positions = np.arange(start, start + whole)[self._part]
            batch = self._gather(np.minimum(positions, size - 1))
            yield batch | {"mask": (positions < size).astype(np.float32)}


def prefetch(produce: Callable[[int], T], start: int, stop: int, *, depth: int = 2) -> Iterator[T]:
    """``produce(start), …, produce(stop - 1)``, computed ``depth`` ahead in one thread.

    Args:
      produce: makes the item of a step; its exception is raised where the item is taken.
      start: first step.
      stop: step after the last.
      depth: how many items are kept ready, which bounds the memory.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: collections.deque[Future[Any]] = collections.deque()
        upcoming = iter(range(start, stop))
        for step in upcoming:
            waiting.append(pool.submit(produce, step))
            if len(waiting) < depth:
                continue
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
