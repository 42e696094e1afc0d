"""The memory report's picture: bars by network and method."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from mimicnorm_jax.tools.memory.compiled import Row

_COLOURS = ("#4477aa", "#228833", "#999999", "#ccbb44", "#ee6677", "#aa3377", "#66ccee")
_BAR = 0.24  # inches


def plot(groups: Mapping[str, Sequence[Row]], path: pathlib.Path) -> None:
    """Draws the peak of every row as a part of that of the first row of its group.

    The darker part of a bar are the arguments of the step: parameters, optimizer and batch.

    Args:
      groups: rows by title.
      path: ``.png``, ``.svg`` or ``.pdf``.
    """
    methods = list(dict.fromkeys(row.method for rows in groups.values() for row in rows))
    colours = {m: _COLOURS[index % len(_COLOURS)] for index, m in enumerate(methods)}
    bars = sum(len(rows) + 1 for rows in groups.values())
    figure = Figure(figsize=(9, 1.0 + _BAR * bars), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    for title, rows in groups.items():
        ticks.append((position + (len(rows) - 1) / 2, title))
        whole = rows[0].peak_bytes
        for row in rows:
            ratio, fixed = row.peak_bytes / whole, row.argument_bytes / whole
            color = colours[row.method]
            axes.barh(position, ratio, color=color, alpha=0.55, height=0.9)
            axes.barh(position, fixed, color=color, height=0.9)
            note = f" {row.peak_bytes / 2**20:,.0f} MiB  {row.method}"
            axes.text(ratio, position, note, va="center", fontsize=7)
            position += 1
        position += 1
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axes.invert_yaxis()
    widest = max(row.peak_bytes / rows[0].peak_bytes for rows in groups.values() for row in rows)
    axes.set_xlim(0, 1.45 * widest)
    axes.set_xlabel("peak memory of a training step, relative to the first bar (dark: arguments)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
