import contextlib
import hashlib
import io
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data.pipeline import Pipeline, Workers, prefetch
from mimicnorm_jax.data.random_crop import RandomResizedCrop, uniforms
from mimicnorm_jax.data.sources import ArraySource, EncodedSource, View
from mimicnorm_jax.errors import UserError

N, B = 103, 16  # the batch does not divide the data set


@pytest.fixture
def source():
    images = np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return ArraySource(images, np.arange(N), [str(i) for i in range(N)])


class Encoded(EncodedSource):
    """The same examples as PNG files that exist in memory alone."""

    identity = "encoded"

    def __init__(self, source):
        super().__init__(source.class_names, View(size=2, resize=2, upright=True), channels=1)
        self._source = source

    def __len__(self):
        return len(self._source)

    def read(self, index):
        image, label = self._source[index]
        return as_png(image[..., 0]), label

    def describe(self, index):
        return f"example {index}"


def as_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def labels(pipeline, steps):
    return np.concatenate([pipeline.batch(step)["label"] for step in steps])


def test_every_example_comes_exactly_once_an_epoch_and_nothing_is_dropped(source):
    stream = labels(Pipeline(source, batch_size=B, seed=0), range(N))  # B epochs
    epochs = stream.reshape(B, N)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert len({epoch.tobytes() for epoch in epochs}) == B
    assert not np.array_equal(epochs[0], np.arange(N))


def test_a_batch_depends_on_seed_and_step_alone(source):
    one, other = (Pipeline(source, batch_size=B, seed=3) for _ in range(2))
    forward = [one.batch(step)["label"] for step in range(20)]
    backward = [other.batch(step)["label"] for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert not np.array_equal(forward[0], Pipeline(source, batch_size=B, seed=4).batch(0)["label"])


def test_the_order_is_pinned(source):
    """Published runs hang on it: it may not change with a version of NumPy."""
    pinned = [0, 72, 31, 8, 51, 19, 26, 9]
    assert labels(Pipeline(source, batch_size=8, seed=0), [0]).tolist() == pinned


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_all_processes_put_together_are_the_batch(source, count):
    whole = Pipeline(source, batch_size=B, seed=1)
    parts = [
        Pipeline(source, batch_size=B, seed=1, process_index=i, process_count=count)
        for i in range(count)
    ]
    for step in (0, 6, 7, 50):
        together = np.concatenate([part.batch(step)["image"] for part in parts])
        np.testing.assert_array_equal(together, whole.batch(step)["image"])
    masks = [
        np.concatenate(m)
        for m in zip(*([b["mask"] for b in p.evaluation_batches()] for p in parts), strict=True)
    ]
    np.testing.assert_array_equal(masks, [b["mask"] for b in whole.evaluation_batches()])


def test_reading_one_by_one_gives_the_same_batches(source):
    eager, lazy = (Pipeline(s, batch_size=B, seed=0) for s in (source, Encoded(source)))
    for step in (0, 6):
        for name in ("image", "label"):
            np.testing.assert_array_equal(eager.batch(step)[name], lazy.batch(step)[name])


@pytest.mark.parametrize("batch_size", [1, 10, 16, 103, 200])
def test_evaluation_counts_every_example_once(source, batch_size):
    batches = list(Pipeline(source, batch_size=batch_size, seed=0).evaluation_batches())
    assert all(len(batch["image"]) == batch_size for batch in batches)
    seen = np.concatenate([batch["label"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(N))


def test_images_stay_uint8_on_the_host(source):
    assert Pipeline(source, batch_size=B, seed=0).batch(0)["image"].dtype == np.uint8


def test_a_batch_that_does_not_divide_by_the_processes_is_an_error(source):
    with pytest.raises(ValueError, match="3 processes"):
        Pipeline(source, batch_size=B, seed=0, process_count=3)


def shas(batches):
    return [
        hashlib.sha256(b["image"].tobytes() + b["label"].tobytes()).hexdigest() for b in batches
    ]


class Photos(Encoded):
    """Every example is a noise image of its own; some can be made bad."""

    def __init__(self, source, *, bad=None, deadly=None):
        super().__init__(source)
        self.view = View(size=4, resize=4, upright=True)
        self.image_shape = (4, 4, 1)
        self.bad, self.deadly = bad, deadly

    def read(self, index):
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = np.random.default_rng(index).integers(0, 256, (12, 9), np.uint8)
        data = as_png(pixels)
        return (data[:60] if index == self.bad else data), int(index)


WORKERS = [Workers(threads=1), Workers(threads=3), Workers(threads=1, processes=2)]


class TestRandomCropsByStep:
    def pipeline(self, source, **options):
        return Pipeline(source, batch_size=B, seed=5, crop=RandomResizedCrop(), **options)

    @pytest.mark.parametrize("workers", WORKERS, ids=["thread", "threads", "processes"])
    def test_workers_change_nothing(self, source, workers):
        photos = Photos(source)
        expected = shas(self.pipeline(photos).batch(step) for step in range(3, 12))
        got = shas(self.pipeline(photos, workers=workers).batches(3, 12))
        assert got == expected
        assert len(set(expected)) == 9

    @pytest.mark.parametrize("workers", WORKERS[1:], ids=["threads", "processes"])
    def test_batches_are_in_memory_of_their_own(self, source, workers):
        """Not in what processes share: that would be held until the program ends."""
        for batch in self.pipeline(Photos(source), workers=workers).batches(0, 2):
            assert {type(values) for values in batch.values()} == {np.ndarray}
            assert all(values.flags.owndata for values in batch.values())

    def test_an_example_is_cropped_otherwise_in_every_epoch(self, source):
        pipeline = self.pipeline(Photos(source))
        epochs = [{}, {}]
        for step in range(2 * N // B):
            batch, indices = pipeline.batch(step), pipeline.indices(step)
            for image, index in zip(batch["image"], indices, strict=True):
                epoch = epochs[int(index in epochs[0])]
                epoch[int(index)] = image.tobytes()
        both = epochs[0].keys() & epochs[1].keys()
        assert len(both) > N // 2
        assert np.mean([epochs[0][i] == epochs[1][i] for i in both]) < 0.05

    @pytest.mark.parametrize("count", [2, 4])
    def test_processes_put_together_see_the_same_crops(self, source, count):
        photos = Photos(source)
        parts = [self.pipeline(photos, process_index=i, process_count=count) for i in range(count)]
        whole = self.pipeline(photos)
        for step in (0, 6, 7):  # an epoch ends within step 6
            for name in ("image", "label"):
                together = np.concatenate([part.batch(step)[name] for part in parts])
                np.testing.assert_array_equal(together, whole.batch(step)[name])

    def test_the_crops_are_pinned(self, source):
        """Published runs hang on them: they may not change with a version of NumPy."""
        crop = RandomResizedCrop()
        u = uniforms(0, 3, 8, crop.draws)[7]
        assert u[:2].tolist() == [0.4880495279571221, 0.14613795339772329]
        assert crop.choose(375, 500, u) == (2, 32, 349, 284)

    def test_evaluation_is_in_order_with_any_workers(self, source):
        for workers in WORKERS:
            pipeline = Pipeline(Photos(source), batch_size=B, seed=0, workers=workers)
            batches = list(pipeline.evaluation_batches())
            seen = np.concatenate([b["label"][b["mask"] == 1] for b in batches])
            np.testing.assert_array_equal(seen, np.arange(N))

    @pytest.mark.parametrize("workers", WORKERS[1:], ids=["threads", "processes"])
    def test_a_damaged_image_is_named_wherever_it_is_decoded(self, source, workers):
        pipeline = self.pipeline(Photos(source, bad=17), workers=workers)
        with pytest.raises(UserError, match="cannot read image example 17: "):
            list(prefetch(pipeline.batches(0, 20), lambda batch: batch))

    def test_a_worker_process_that_dies_is_reported(self, source):
        pipeline = self.pipeline(Photos(source, deadly=17), workers=WORKERS[2])
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="exit code -9"):
            list(prefetch(pipeline.batches(0, 20), lambda batch: batch))
        assert time.monotonic() - start < 60

    def test_worker_processes_end_with_their_iterator(self, source):
        pipeline = self.pipeline(Photos(source), workers=WORKERS[2])
        batches = pipeline.batches(0, 1000)
        next(batches)
        workers = [p for p in multiprocessing.active_children() if p.is_alive()]
        assert workers
        batches.close()
        deadline = time.monotonic() + 20
        while any(p.is_alive() for p in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(p.is_alive() for p in workers)

    def test_worker_processes_leave_interrupts_to_the_training_process(self, source):
        pipeline = self.pipeline(Photos(source), workers=WORKERS[2])
        with contextlib.closing(pipeline.batches(0, 12)) as batches:
            got = [next(batches), next(batches)]  # one of each worker
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            got += list(batches)
        assert shas(got) == shas(pipeline.batch(step) for step in range(12))

    def test_pixels_in_memory_cannot_be_cropped_so(self, source):
        with pytest.raises(ValueError, match="encoded"):
            self.pipeline(source)


class TestPrefetch:
    def test_gives_every_item_in_order(self):
        assert list(prefetch(range(3, 9), lambda x: x * x)) == [9, 16, 25, 36, 49, 64]
        assert list(prefetch([], str)) == []
        assert list(prefetch([5], str)) == ["5"]

    def test_raises_where_the_item_is_taken(self):
        def items():
            yield from (0, 1)
            raise OSError("bad file")

        taken = prefetch(items(), str)
        assert [next(taken), next(taken)] == ["0", "1"]
        with pytest.raises(OSError, match="bad file"):
            next(taken)

    def test_is_ahead_and_bounded(self):
        placed = []
        items = prefetch(
            range(100), lambda step: placed.append((step, threading.get_ident())) or step, depth=3
        )
        next(items)
        time.sleep(0.2)
        assert [step for step, _ in placed] == [0, 1, 2]
        assert placed[0][1] != threading.get_ident()
        items.close()


def test_memory_that_a_run_leaves_behind_is_taken_back_in_silence():
    program = (
        "import os, sys\n"
        "from multiprocessing import shared_memory\n"
        "from mimicnorm_jax.data.pipeline import start_silent_resource_tracker\n"
        "start_silent_resource_tracker()\n"
        "memory = shared_memory.SharedMemory(create=True, size=10)\n"
        "print(memory.name, flush=True)\n"
        "print('heard', file=sys.stderr, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "heard\n"
    memory = pathlib.Path("/dev/shm", done.stdout.strip().lstrip("/"))
    deadline = time.monotonic() + 10
    while memory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not memory.exists()
