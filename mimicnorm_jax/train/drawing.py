"""Pictures of an evaluation: what is taken for what, and how far probabilities can be trusted."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MOST_NAMES = 40  # that can be read beside a matrix


def plot_evaluation(details: Mapping[str, Any], title: str, path: pathlib.Path) -> None:
    """Draws the confusion matrix and the reliability of an evaluation.

    Args:
      details: of ``scores.details``.
      title: of the picture.
      path: where it goes.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_confusion(figure, left, details)
    draw_reliability(right, details)
    figure.savefig(path, dpi=120)


def _draw_confusion(figure: Figure, axes: Axes, details: Mapping[str, Any]) -> None:
    counts = np.asarray(details["confusion"], float)
    names = [row["class"] for row in details["classes"]]
    rows = np.flatnonzero(counts.sum(1))  # of the classes that have images
    counts = counts[rows]
    shares = 100 * counts / counts.sum(1, keepdims=True)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the images of a class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="class", title="what is taken for what")
    if len(names) > _MOST_NAMES:
        return
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), [names[row] for row in rows], fontsize=8)
    if len(names) > 15:
        return
    for i, j in np.argwhere(shares >= 0.5):
        color = "white" if shares[i, j] > 60 else "black"
        axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)


def draw_reliability(axes: Axes, details: Mapping[str, Any]) -> None:
    """Draws accuracy over confidence; on the diagonal probabilities are what they say.

    Args:
      axes: to draw on.
      details: of ``scores.details``.
    """
    axes.plot((0, 1), (0, 1), color="gray", ls=":", label="right as often as it is sure")
    labels = {"reliability": "as the network says", "reliability_calibrated": "with temperature"}
    for name, label in labels.items():
        if name not in details:
            continue
        count, confidence, accuracy = (
            np.asarray(details[name][key]) for key in ("count", "confidence", "accuracy")
        )
        filled = count > 0
        error = np.sum(count * np.abs(confidence - accuracy)) / count.sum()
        (line,) = axes.plot(
            confidence[filled],
            accuracy[filled],
            marker="o",
            ms=4,
            label=f"{label}: calibration error {100 * error:.1f} %",
        )
        sizes = 400 * count[filled] / count.sum()
        color = line.get_color()
        axes.scatter(confidence[filled], accuracy[filled], s=sizes, color=color, alpha=0.3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="reliability")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.grid(alpha=0.3)
