"""The least cross-entropy that logits can have behind the last BN."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

_Point = tuple[np.ndarray, np.ndarray]

_TOLERANCE = 1e-5  # nats
_SHORTEST = 2.0
_MOST_ITERATIONS = 10_000


def last_bn_loss_floor(
    counts: Sequence[int] | np.ndarray, *, label_smoothing: float = 0.0
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

    Returns:
      The floor in nats, or up to 1e-5 less.

    Raises:
      ValueError: there are no examples, or fewer than 2 classes.
    """
    present = np.asarray(counts)
    if present.ndim != 1 or present.size < 2 or present.min() < 0 or not present.sum():
        raise ValueError(f"counts of examples of at least 2 classes are needed, got {counts!r}")
    sizes, classes = np.unique(present, return_counts=True)
    return _floor(tuple(sizes.tolist()), tuple(classes.tolist()), float(label_smoothing))


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
    floors = [last_bn_loss_floor(c, label_smoothing=label_smoothing) for c in counts]
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
def _floor(sizes: tuple[int, ...], classes: tuple[int, ...], smoothing: float) -> float:
    """Projected gradient descent whose steps are as long as the convexity seen allows.

    Steps of ``_SHORTEST`` always do: half is the most that the second derivative of a
    cross-entropy can be. Where examples are told apart well it is far less.
    """
    groups = _Groups(sizes, classes, smoothing)
    point, length = groups.start(), _SHORTEST
    loss, slopes, gap = groups.loss(*point)
    for _ in range(_MOST_ITERATIONS):
        if gap < _TOLERANCE:
            break
        length *= 4
        while True:
            own, other = (p - length * slope for p, slope in zip(point, slopes, strict=True))
            new = groups.projected(own, other)
            found = groups.loss(*new)
            if length <= _SHORTEST or found[0] <= loss + groups.bound(new, point, slopes, length):
                break
            length /= 4
        point, (loss, slopes, gap) = new, found
    return max(0.0, loss - gap)
