import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mimicnorm_jax.layers import last_bn_cross_entropy, last_bn_loss_floor, loss_floor


def balanced(classes):
    return math.log1p((classes - 1) * math.exp(-classes / math.sqrt(classes - 1)))


def one_each(classes, batch):
    own = (batch - 1) * math.exp(-batch / math.sqrt(batch - 1))
    return math.log1p(own + (classes - batch) * math.exp(-math.sqrt(batch - 1)))


@pytest.mark.parametrize(
    ("counts", "expected", "shown"),
    [
        ([16] * 2, balanced(2), 0.127),
        ([25] * 10, balanced(10), 0.278),
        ([3] * 100, balanced(100), 0.0043),
        ([1] * 32 + [0] * 68, one_each(100, 32), 0.306),
        ([1] * 32 + [0] * 968, one_each(1000, 32), 1.568),
        ([1] * 256 + [0] * 744, one_each(1000, 256), 1.1e-4),
        ([0] * 92 + [1] * 8, one_each(100, 8), 2.06),
        ([1, 1], balanced(2), 0.127),
    ],
)
def test_the_closed_forms(counts, expected, shown):
    assert last_bn_loss_floor(counts) == pytest.approx(expected, abs=2e-5)
    assert expected == pytest.approx(shown, rel=0.05)


def least_loss_of_free_logits(counts, smoothing):
    """Of logits that are optimized themselves, behind the project's own last BN."""
    labels = jnp.repeat(jnp.arange(len(counts)), jnp.asarray(counts))

    def loss(logits):
        logits = logits.reshape(len(labels), len(counts))
        # An epsilon that lets a column's variance become any below 1.
        losses, *_ = last_bn_cross_entropy(logits, labels, epsilon=0.01, label_smoothing=smoothing)
        return losses.mean()

    start = 0.01 * jax.random.normal(jax.random.key(0), (len(labels) * len(counts),), jnp.float64)
    start += jax.nn.one_hot(labels, len(counts), dtype=jnp.float64).ravel()
    found = scipy.optimize.minimize(
        jax.jit(jax.value_and_grad(loss)),
        np.asarray(start),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return found.fun


def drawn(classes, batch):
    draws = np.random.default_rng(0).integers(0, classes, batch)
    return np.bincount(draws, minlength=classes).tolist()


@pytest.mark.parametrize(
    ("counts", "smoothing"),
    [
        ([60, 4], 0.0),
        (drawn(2, 32), 0.0),
        ([25] * 10, 0.1),
        (drawn(10, 250), 0.0),
        (drawn(10, 250), 0.1),
        (drawn(100, 32), 0.0),
        pytest.param(drawn(100, 300), 0.0, marks=pytest.mark.long),
        pytest.param(drawn(1000, 32), 0.0, marks=pytest.mark.long),
        pytest.param(drawn(100, 32), 0.05, marks=pytest.mark.long),
    ],
)
def test_free_logits_come_as_low_and_no_lower(counts, smoothing, float64):
    floor = last_bn_loss_floor(counts, label_smoothing=smoothing)
    assert least_loss_of_free_logits(counts, smoothing) == pytest.approx(floor, abs=1e-4)


def test_a_smoothed_optimum_within_reach_is_the_floor():
    """Many classes let logits be as far apart as the targets ask: what is left is their entropy."""
    share = 0.1 / 100
    entropy = -(0.9 + share) * math.log(0.9 + share) - 99 * share * math.log(share)
    assert last_bn_loss_floor([3] * 100, label_smoothing=0.1) == pytest.approx(entropy, abs=2e-5)
    # with 10 classes they may not
    share = 0.1 / 10
    entropy = -(0.9 + share) * math.log(0.9 + share) - 9 * share * math.log(share)
    assert entropy == pytest.approx(0.5003, abs=1e-4)
    assert last_bn_loss_floor([25] * 10, label_smoothing=0.1) == pytest.approx(0.5784, abs=1e-4)


@pytest.mark.parametrize(
    ("classes", "batch", "smoothing"),
    [(100, 128, 0.1), (200, 128, 0.1), (1000, 256, 0.05), (1000, 256, 0.0), (10, 64, 0.0)],
)
def test_a_rough_floor_is_near_and_takes_few_steps(classes, batch, smoothing, monkeypatch):
    """It is computed at every step of training."""
    steps = []
    original = loss_floor._Groups.loss

    def loss(*given):
        steps.append(1)
        return original(*given)

    monkeypatch.setattr(loss_floor._Groups, "loss", loss)
    counts, given = drawn(classes, batch), {"label_smoothing": smoothing}
    rough = last_bn_loss_floor(counts, **given, tolerance=1e-3)
    assert len(steps) < (600 if smoothing else 100)
    assert 0 <= last_bn_loss_floor(counts, **given, tolerance=1e-6) - rough < 1e-3


@pytest.mark.parametrize("counts", [[], [3], [0, 0], [1, -1, 3], [[1, 2]]])
def test_wrong_counts_are_named(counts):
    with pytest.raises(ValueError, match="at least 2 classes"):
        last_bn_loss_floor(counts)
