"""The least cross-entropy that logits can have behind the last BN."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

_Point = tuple[np.ndarray, np.ndarray]

_SHORTEST = 2.0
_MOST_STEPS = 1000


def last_bn_loss_floor(
    counts: Sequence[int] | np.ndarray, *, label_smoothing: float = 0.0, tolerance: float = 1e-5
) -> float:
    """The infimum of the mean cross-entropy of a training batch behind ``LastBN``.

    The last BN gives every column of the logits ``(B, C)`` mean 0 and a variance below 1. What it
    can put out is a convex set, and cross-entropy a convex function on it: there is one least
    value, which depends on how many examples each class has in the batch, and no network gets
    below it. For B examples of C classes, as many of each,

        ``log(1 + (C - 1) exp(-C / sqrt(C - 1)))``

    and for one example of each of B < C classes

        ``log(1 + (B - 1) exp(-B / sqrt(B - 1)) + (C - B) exp(-sqrt(B - 1)))``.

    Args:
      counts: ``(C,)``, the number of examples of each class in the (global) batch.
      label_smoothing: weight of the uniform distribution in the target.
      tolerance: how much less than the floor the result may be, in nats. With many classes and
        label smoothing 1e-5 takes some tens of milliseconds, 1e-3 a few.

    Returns:
      A bound in nats, below which the loss cannot be, and which it can come near.

    Raises:
      ValueError: there are no examples, or fewer than 2 classes.
    """
    present = np.asarray(counts)
    if present.ndim != 1 or present.size < 2 or present.min() < 0 or not present.sum():
        raise ValueError(f"counts of examples of at least 2 classes are needed, got {counts!r}")
    sizes, classes = np.unique(present, return_counts=True)
    groups = tuple(sizes.tolist()), tuple(classes.tolist())
    return _floor(*groups, float(label_smoothing), tolerance)


def expected_loss_floor(
    *, num_classes: int, batch_size: int, label_smoothing: float = 0.0, draws: int = 64
) -> float:
    """The mean of ``last_bn_loss_floor`` over random batches of equally frequent classes.

    Args:
      num_classes: C.
      batch_size: B, the number of examples in the (global) batch.
      label_smoothing: weight of the uniform distribution in the target.
      draws: batches that are drawn, always the same ones.

    Returns:
      The floor, in nats.
    """
    labels = np.random.default_rng(0).integers(0, num_classes, (draws, batch_size))
    counts = [np.bincount(batch, minlength=num_classes) for batch in labels]
    options = {"label_smoothing": label_smoothing, "tolerance": 1e-3 if label_smoothing else 1e-5}
    floors = [last_bn_loss_floor(c, **options) for c in counts]
    return sum(floors) / draws


class _Groups:
    """Classes with as many examples each, which the least loss treats alike.

    A point has for each group the logit of its own class ``(G,)`` and those of another class of
    each group ``(G, G)``; groups without examples have neither.
    """

    def __init__(self, sizes: tuple[int, ...], classes: tuple[int, ...], smoothing: float):
        size, self.classes = np.asarray(sizes, float), np.asarray(classes, float)
        batch = float(size @ self.classes)
        same = np.eye(len(sizes))
        self.there = size > 0
        self.columns = self.classes[None] - same  # of each group, for an example of a row's class
        # weights of the entries in the mean over one column
        self.own_weight = size / batch
        self.weight = size[:, None] * (self.classes[:, None] - same) / batch
        share = smoothing / self.classes.sum()
        self.target, self.other_target = 1 - smoothing + share, share

    def start(self) -> _Point:
        """The last BN of the labels."""
        zeros = np.zeros(self.weight.shape)
        return self.projected(np.where(self.there, 1e3, 0.0), zeros)

    def projected(self, own: np.ndarray, other: np.ndarray) -> _Point:
        """The nearest point whose columns have mean 0 and a variance of at most 1."""
        own, other, deviation = self._centred(own, other)
        scale = 1 / np.maximum(deviation, 1.0)
        return own * scale, other * scale[None]

    def _centred(self, own: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, ...]:
        """Without the columns' means, and their deviations."""
        mean = self.own_weight * own + (self.weight * other).sum(0)
        own = np.where(self.there, own - mean, 0.0)
        other = np.where(self.there[:, None], other - mean[None], 0.0)
        variance = self.own_weight * own**2 + (self.weight * other**2).sum(0)
        return own, other, np.sqrt(variance)

    def bound(self, new: _Point, old: _Point, slopes: _Point, length: float) -> float:
        """By how much a step of this length raises the loss at most, if it is short enough."""
        own, other = (n - o for n, o in zip(new, old, strict=True))
        rise = self.own_weight * own * (slopes[0] + own / (2 * length))
        rises = self.weight * other * (slopes[1] + other / (2 * length))
        return float(self.classes @ (rise + rises.sum(0)))

    def loss(self, own: np.ndarray, other: np.ndarray) -> tuple[float, _Point, float]:
        """The mean cross-entropy, its gradient, and how far it is at most from the least one.

        Of a convex function: by how much its tangent falls on the way to its least point
        (Frank and Wolfe 1956; the gap of Jaggi 2013).
        """
        largest = np.maximum(own, other.max(1))
        exponents = np.exp(own - largest), np.exp(other - largest[:, None])
        total = exponents[0] + (self.columns * exponents[1]).sum(1)
        hit = self.target * own + self.other_target * (self.columns * other).sum(1)
        loss = float((self.own_weight * self.classes) @ (np.log(total) + largest - hit))
        slope = exponents[0] / total - self.target
        slopes = exponents[1] / total[:, None] - self.other_target
        along = self.own_weight * slope * own + (self.weight * slopes * other).sum(0)
        steepest = self._centred(slope, slopes)[2]
        return loss, (slope, slopes), float(self.classes @ (along + steepest))


@functools.lru_cache(maxsize=4096)
def _floor(
    sizes: tuple[int, ...], classes: tuple[int, ...], smoothing: float, tolerance: float
) -> float:
    """Accelerated projected gradient descent (Beck and Teboulle 2009), restarted where it rises.

    Steps are as long as the convexity seen allows. Those of ``_SHORTEST`` always do: half is the
    most that the second derivative of a cross-entropy can be; where examples are told apart well
    it is far less.
    """
    groups = _Groups(sizes, classes, smoothing)
    point = ahead = groups.start()
    loss, slopes, gap = groups.loss(*point)
    bound, ahead_loss = loss - gap, loss
    momentum, length = 1.0, _SHORTEST
    for _ in range(_MOST_STEPS):
        if loss - bound < tolerance:
            break
        length *= 2
        while True:
            own, other = (a - length * s for a, s in zip(ahead, slopes, strict=True))
            new = groups.projected(own, other)
            found, _, gap = groups.loss(*new)
            allowed = ahead_loss + groups.bound(new, ahead, slopes, length)
            if length <= _SHORTEST or found <= allowed:
                break
            length /= 2
        bound = max(bound, found - gap)
        if found > loss and ahead is not point:
            momentum, ahead = 1.0, point
        else:
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            factor = (momentum - 1) / following
            own, other = (n + factor * (n - p) for n, p in zip(new, point, strict=True))
            point, ahead, momentum, loss = new, (own, other), following, found
        ahead_loss, slopes, _ = groups.loss(*ahead)
    return max(0.0, bound)
