"""What the logits of a network for labelled images come to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.calibration import Reliability, log_probabilities, reliability

_TOP = 5
_ROWS = 8192  # of logits that are worked on at a time


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Logits and labels of a split, in its order.

    Attributes:
      logits: ``(N, C)``.
      labels: integers ``(N,)``, which name columns of the logits.
    """

    logits: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def predictions(self) -> np.ndarray:
        """The classes of the greatest logits, integers ``(N,)``."""
        return np.argmax(self.logits, axis=-1)

    @property
    def correct(self) -> np.ndarray:
        """Which predictions are right, bool ``(N,)``."""
        return np.asarray(self.predictions == self.labels)

    def restricted(self, columns: Sequence[int]) -> Outputs:
        """The same over some of the classes, among which all labels are."""
        places = {column: place for place, column in enumerate(columns)}
        labels = np.array([places[label] for label in self.labels.tolist()], np.int64)
        return Outputs(self.logits[:, list(columns)], labels)


def _of_rows(outputs: Outputs, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each label, and the confidence in each prediction."""
    losses, confidences = [], []
    for start in range(0, len(outputs.labels), _ROWS):
        part = slice(start, start + _ROWS)
        found = log_probabilities(outputs.logits[part], temperature)
        losses.append(-np.take_along_axis(found, outputs.labels[part, None], -1)[:, 0])
        confidences.append(np.exp(found.max(-1)))
    return np.concatenate(losses), np.concatenate(confidences)


def reliability_of(outputs: Outputs, temperature: float) -> Reliability:
    """How often the network is right that is so sure."""
    return reliability(_of_rows(outputs, temperature)[1], outputs.correct)


def probability_scores(outputs: Outputs, temperature: float) -> dict[str, float]:
    """``loss``, the mean negative log-likelihood in nats, and ``calibration_error`` in [0, 1]."""
    losses, confidences = _of_rows(outputs, temperature)
    return {
        "loss": float(losses.mean()),
        "calibration_error": reliability(confidences, outputs.correct).error,
    }


def top_accuracy(outputs: Outputs, count: int = _TOP) -> float:
    """How often the label is among the ``count`` likeliest classes; ties go to the first."""
    own = np.take_along_axis(outputs.logits, outputs.labels[:, None], -1)
    before = np.arange(outputs.logits.shape[-1]) < outputs.labels[:, None]
    ahead = (outputs.logits > own) | ((outputs.logits == own) & before)
    return float(np.mean((ahead.sum(-1) < count) & np.isfinite(own[:, 0])))


def confusion_of(outputs: Outputs) -> np.ndarray:
    """How often each class (rows) is taken for each (columns), integers ``(C, C)``."""
    classes = outputs.logits.shape[-1]
    pairs = outputs.labels * classes + outputs.predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(outputs: Outputs, temperature: float | None) -> dict[str, Any]:
    """The numbers of an evaluation.

    Args:
      outputs: of the images.
      temperature: of the calibrated probabilities; None where there are none.

    Returns:
      ``accuracy``, ``loss``, ``calibration_error`` and ``examples``; with more than 5 classes
      ``top5_accuracy``; with a temperature also ``loss_calibrated`` and
      ``calibration_error_calibrated``.
    """
    found: dict[str, Any] = {
        "examples": len(outputs.labels),
        "accuracy": float(outputs.correct.mean()),
        **probability_scores(outputs, 1.0),
    }
    if outputs.logits.shape[-1] > _TOP:
        found["top5_accuracy"] = top_accuracy(outputs)
    if temperature is not None:
        calibrated = probability_scores(outputs, temperature)
        found |= {f"{name}_calibrated": value for name, value in calibrated.items()}
    return found


def details(
    outputs: Outputs, class_names: Sequence[str], temperature: float | None
) -> dict[str, Any]:
    """What is too long for the screen.

    Args:
      outputs: of the images.
      class_names: of the logits.
      temperature: of the calibrated probabilities; None where there are none.

    Returns:
      ``classes``: name, examples and accuracy (None without examples) of each; ``confusion``, see
      ``confusion_of``; ``reliability``, and with a temperature ``reliability_calibrated``: count,
      confidence and accuracy of each bin, see ``Reliability``.
    """
    confusion = confusion_of(outputs)
    counts = confusion.sum(1)
    bins = {"reliability": reliability_of(outputs, 1.0)}
    if temperature is not None:
        bins["reliability_calibrated"] = reliability_of(outputs, temperature)
    return {
        "classes": [
            {"class": name, "examples": int(n), "accuracy": float(right / n) if n else None}
            for name, n, right in zip(class_names, counts, np.diag(confusion), strict=True)
        ],
        "confusion": confusion.tolist(),
        **{
            name: {key: value.tolist() for key, value in dataclasses.asdict(found).items()}
            for name, found in bins.items()
        },
    }
