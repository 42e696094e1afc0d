"""What a conversion did, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NamedTuple

INFERENCE = "inference"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
      path: where it is in the network that was given.
      became: what was done and why.
      centered: whether its kernel is centred now.
      fan_in: number of weights of one output channel; None for a norm.
      scale: initial residual scalar, of a stack of layers one a member.
      variance: of its weights, now.
      second_moment_before: of what it put out on the arguments, with its kernel centred but not yet
        rescaled, without its bias and its scalar; the layers before it are as they are now.
      second_moment: the same, now; of a stack of layers the one farthest from 1. None where it was
        not measured.
    """

    path: str
    became: str
    centered: bool = False
    fan_in: int | None = None
    scale: float | tuple[float, ...] | None = None
    variance: float | None = None
    second_moment_before: float | None = None
    second_moment: float | None = None


class Memory(NamedTuple):
    """Bytes that a training step needs at its peak, by the compiler of this machine.

    Attributes:
      before: of the network with its BatchNorms.
      after: of the converted one.
    """

    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    ``print(report)`` shows a table.

    Attributes:
      to: the method; ``"inference"`` of what ``fold`` makes.
      layers: its convolutions, dense layers and BatchNorms, in the order of the network.
      notes: what else is to be known, each one line.
      memory: of a training step before and after, where it was asked for.
      num_centered: number of layers with weight mean.
    """

    to: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    memory: Memory | None = None

    @property
    def num_centered(self) -> int:
        return sum(layer.centered for layer in self.layers)

    def to_json(self) -> str:
        """The report as JSON."""
        memory = None if self.memory is None else self.memory._asdict()
        fields = {**dataclasses.asdict(self), "memory": memory, "num_centered": self.num_centered}
        return json.dumps(fields, indent=1)

    def __str__(self) -> str:
        head = ("layer", "fan-in", "scalar", "variance", "2nd moment", "what was done")
        rows = [head, *(_row(layer) for layer in self.layers)]
        empty = {place for place in range(1, 5) if not any(row[place] for row in rows[1:])}
        rows = [tuple(c for place, c in enumerate(row) if place not in empty) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines = []
        for path, *numbers, became in rows:
            cells = [path.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([*cells, became]))
        if self.to != INFERENCE:
            layers = "layer" if self.num_centered == 1 else "layers"
            lines.append(f"{self.num_centered} {layers} centred, method {self.to}")
        if self.memory is not None:
            before, after = (size / 2**20 for size in self.memory)
            lines.append(
                f"memory of a training step: {before:.4g} → {after:.4g} MiB ({after / before:.2f})"
            )
        return "\n".join(line.rstrip() for line in [*lines, *(f"note: {n}" for n in self.notes)])


def _row(layer: LayerReport) -> tuple[str, ...]:
    moments = ""
    if layer.second_moment is not None:
        moments = f"{_short(layer.second_moment_before)} → {_short(layer.second_moment)}"
    scale = layer.scale
    if isinstance(scale, tuple):
        scales = f"{scale[0]:.3g} … {scale[-1]:.3g}"
    else:
        scales = "" if scale is None else f"{scale:.3g}"
    return (
        layer.path,
        "" if layer.fan_in is None else str(layer.fan_in),
        scales,
        "" if layer.variance is None else f"{layer.variance:.3g}",
        moments,
        layer.became,
    )


def _short(value: float | None) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.3g}"


def farthest_from_one(moments: Any) -> float:
    """Of several second moments that which a factor separates most from 1."""
    values = [float(value) for value in getattr(moments, "ravel", lambda: [moments])()]
    return max(values, key=lambda value: abs(math.log(value)) if value > 0 else math.inf)
