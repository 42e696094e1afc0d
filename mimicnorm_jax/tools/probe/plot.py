"""The probe's picture: channels as in the paper's Figures 2 and 3, and curves over depth."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from mimicnorm_jax.tools.probe.rows import Row


def _deep_layers(rows: Sequence[Row]) -> tuple[int, int]:
    """Indices of the middle one and the last of the layers that are like each other.

    Additions, which are not layers, and what follows the last convolution are left out.
    """
    kinds = ("merge", "hidden", "classifier")
    layers = [i for i, row in enumerate(rows) if not any(kind in row.layer for kind in kinds)]
    return layers[len(layers) // 2], layers[-1]


def _channels(axes: Any, row: Row, title: str) -> None:
    """Boxes: middle half of a channel's values, with its median; lines: 5 % to 95 %."""
    boxes = [
        {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high, "fliers": []}
        for low, q1, median, q3, high in row.quantiles
    ]
    axes.bxp(boxes, showfliers=False, widths=0.7, boxprops={"lw": 0.8}, whiskerprops={"lw": 0.6})
    axes.axhline(0, color="grey", lw=0.6)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(boxes)} channels", fontsize=8)


def plot(rows: dict[str, list[Row]], path: pathlib.Path, title: str) -> None:
    """Draws the rows of several methods side by side.

    Args:
      rows: of ``probe.rows.probe``, by method.
      path: of the picture; the ending says its format.
      title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = max(3, len(rows))
    figure = Figure(figsize=(4.2 * columns, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    above, below = parts
    boxes = above.subplots(2, len(rows), squeeze=False, sharey="row")
    for column, (method, of_method) in enumerate(rows.items()):
        for line, index in enumerate(_deep_layers(of_method)):
            row = of_method[index]
            name = f"{method}: {row.layer} (layer {index + 1}), correlation {row.correlation:.2f}"
            _channels(boxes[line, column], row, name)
    boxes[0, 0].set_ylabel("pre-activation of a channel")
    boxes[1, 0].set_ylabel("pre-activation of a channel")
    curves = below.subplots(1, 3)
    for index, (method, of_method) in enumerate(rows.items()):
        depth = list(range(1, len(of_method) + 1))
        color = f"C{index}"
        for axes, quantity in zip(curves, ("second_moment", "correlation"), strict=False):
            axes.plot(depth, [getattr(r, quantity) for r in of_method], "o", ms=3, color=color)
            predicted = [getattr(r, f"predicted_{quantity}") for r in of_method]
            axes.plot(depth, predicted, "-", lw=1, color=color, label=method)
        layers = [(d, r.gradient_norm) for d, r in zip(depth, of_method, strict=True)]
        known = [(d, norm) for d, norm in layers if norm is not None]
        curves[2].plot(*zip(*known, strict=True), "o-", ms=3, lw=0.6, color=color, label=method)
    names = ("second moment", "mean correlation of two images", "gradient norm of the kernel")
    for axes, name in zip(curves, names, strict=True):
        axes.set(xlabel="layer", ylabel=name)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves[0].set_yscale("log")
    curves[2].set_yscale("log")
    curves[0].legend(
        loc="lower left", title="dots: measured, lines: theory", fontsize=8, title_fontsize=8
    )
    figure.savefig(path, dpi=110)
