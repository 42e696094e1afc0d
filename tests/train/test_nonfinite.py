"""Steps that are not finite are skipped, or end the run."""

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import RunError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.setup import set_up
from tests.runs import rows


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_config, tmp_path):
    """A label out of range makes one step's loss NaN."""
    config = tiny_config(network="mlp", max_steps=6, on_nonfinite="skip", log_every=1)
    experiment, bad_batch = poisoned(config, {2, 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up_together", lambda *_: experiment)
        got = loop.train(config, tmp_path / "run")
    assert got["skipped_steps"] == 2 and got["steps"] == 6
    logged = rows(tmp_path / "run")
    counts = [row["skipped_steps"] for row in logged if "skipped_steps" in row]
    assert counts == [0, 0, 1, 1, 2, 2]
    losses = [row["train_loss"] for row in logged if "train_loss" in row]
    assert [loss is None for loss in losses] == [False, False, True, False, True, False]
    # a skipped step changes nothing but the count and the step
    state = experiment.initial_state()
    before = loop.host_copy(state)
    after = loop.host_copy(experiment.train_step(state, bad_batch)[0])
    assert int(after.step) == 1 and int(after.skipped) == 1
    for tree in ("params", "batch_stats"):
        np.testing.assert_equal(getattr(after, tree), getattr(before, tree))
    moments = [
        [leaf for leaf in jax.tree.leaves(state.opt_state) if np.issubdtype(leaf.dtype, np.inexact)]
        for state in (before, after)
    ]
    assert moments[0]
    np.testing.assert_equal(*moments)


def test_more_skipped_steps_than_the_limit_end_the_run(tiny_config, tmp_path):
    config = tiny_config(network="mlp", max_steps=9, on_nonfinite="skip", skip_limit=1)
    experiment, _ = poisoned(config, {2, 4, 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up_together", lambda *_: experiment)
        with pytest.raises(RunError, match=r"2 steps were skipped \(config.skip_limit\).* step 5"):
            loop.train(config, tmp_path / "run")


def poisoned(config, steps):
    """The experiment, with the labels of some steps (from 0) out of range; and a bad batch."""
    experiment = set_up(config)
    pipeline = experiment.train_data
    original = pipeline.batches

    def poison(batch):
        return batch | {"label": np.full_like(batch["label"], 10**6)}

    def batches(start, stop, **options):
        for step, batch in enumerate(original(start, stop, **options), start):
            yield poison(batch) if step in steps else batch

    pipeline.batches = batches
    return experiment, shard_batch(poison(pipeline.batch(0)), experiment.mesh)
