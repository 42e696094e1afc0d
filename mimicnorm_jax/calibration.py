"""Calibrated probabilities: one temperature for a trained network, and how far it is off.

Guo et al. 2017, On calibration of modern neural networks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15  # of confidences, as in the paper
_RANGE = (1e-4, 1e4)  # of temperatures
_ROWS = 8192  # of logits that are worked on at a time


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often a network is right that is so sure, by bins of its confidence.

    The confidence is the probability of the likeliest class; bin i of n has those in
    ``(i / n, (i + 1) / n]``. All arrays are ``(n,)``.

    Attributes:
      count: examples in each bin.
      confidence: their mean confidence; 0 where there is none.
      accuracy: share of them that is right; 0 where there is none.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: mean distance of confidence and accuracy, in [0, 1]."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.sum(self.count * gaps) / np.sum(self.count))


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = BINS) -> Reliability:
    """Sorts examples into bins of equal width by their confidence.

    Args:
      confidence: probabilities of the likeliest classes ``(N,)``.
      correct: whether these are right, bool ``(N,)``.
      bins: how many.
    """
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = np.maximum(count, 1)
    return Reliability(
        count=count,
        confidence=np.bincount(which, confidence, bins) / filled,
        accuracy=np.bincount(which, correct, bins) / filled,
    )


def log_probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """``log softmax(logits / temperature)`` over the last axis, float64."""
    return np.asarray(log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T whose ``softmax(logits / T)`` says best how sure one may be.

    It has the least negative log-likelihood of N examples on which the network was not trained,
    and of one more whose label is any of the classes with equal probability. (Without that one a
    network which is right about all of them would have a temperature of 0, and be sure of
    everything; compare the targets of Platt 1999.) The likelihood is convex in 1 / T, so there is
    one such T.

    Args:
      logits: ``(N, C)``.
      labels: integers ``(N,)``.

    Returns:
      T, positive.

    Raises:
      ValueError: there is no example.
    """
    if not len(labels):
        raise ValueError("a temperature is fitted on at least one example")
    doubt = 1 / (len(labels) + 1)
    parts = [slice(start, start + _ROWS) for start in range(0, len(labels), _ROWS)]

    def loss(log_temperature: float) -> float:
        total = 0.0
        for part in parts:
            found = log_probabilities(logits[part], np.exp(log_temperature))
            right = np.take_along_axis(found, labels[part, None], axis=-1)
            total -= (1 - doubt) * right.sum() + doubt * found.mean(-1).sum()
        return total

    low, high = np.log(_RANGE)
    result = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(result.x))
