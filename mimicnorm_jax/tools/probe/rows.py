"""Every layer of a network, measured and predicted, for each of several methods."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.theory import Layer, Probe
from mimicnorm_jax.tools.inspected import restore, training_images
from mimicnorm_jax.tools.variants import check_options, with_method
from mimicnorm_jax.train.program import network_arguments
from mimicnorm_jax.train.setup import configure_jax


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, averaged over initializations; see ``Measured`` and ``Layer``."""

    layer: str
    mean: float
    variance: float
    second_moment: float
    predicted_second_moment: float
    correlation: float
    predicted_correlation: float
    dead: float
    gradient_norm: float | None
    quantiles: list[list[float]]


def average(draws: Sequence[Layer]) -> Row:
    """The same layer in several initializations; quantiles and gradient are of the first."""
    measured = [layer.measured for layer in draws]

    def mean(values: list[Any]) -> float:
        return float(np.mean(values))

    gradients = [layer.gradient_norm for layer in draws if layer.gradient_norm is not None]
    return Row(
        layer=draws[0].name,
        mean=mean([m.mean for m in measured]),
        variance=mean([m.variance for m in measured]),
        second_moment=mean([m.second_moment for m in measured]),
        predicted_second_moment=mean([layer.predicted_second_moment for layer in draws]),
        correlation=mean([m.correlation for m in measured]),
        predicted_correlation=mean([layer.predicted_correlation for layer in draws]),
        dead=mean([m.dead for m in measured]),
        gradient_norm=mean(gradients) if gradients else None,
        quantiles=np.round(measured[0].quantiles, 4).tolist(),
    )


def probe(
    config: ConfigDict,
    methods: Sequence[str],
    *,
    images: int,
    draws: int = 1,
    checkpoint: pathlib.Path | None = None,
) -> dict[str, list[Row]]:
    """Measures and predicts every layer of the configured network, for each method.

    Args:
      config: the configuration; options of a method apply to the methods that have them.
      methods: names of methods.
      images: how many training images, without augmentation.
      draws: initializations to average over.
      checkpoint: the folder of a run of ``config``; its latest state is probed.

    Raises:
      UserError: whatever is wrong with the configuration, the data or the run.
    """
    check_options(config, methods)
    configure_jax(config)
    trained = None if checkpoint is None else restore(config, checkpoint).evaluated_params
    known, inputs, labels = training_images(config, images)
    arguments = network_arguments(config, known)
    rows = {}
    progress = progress_bar(None, "probing", len(methods) * draws)
    for name in methods:
        progress.set_postfix_str(name)
        watched = Probe(method=method_of(with_method(config, name)), seed=config.seed, **arguments)
        layers = []
        for draw in range(draws):
            if trained is not None:
                watched.load(trained)
            elif draw:
                watched.draw((config.seed + draw) % 2**32)
            # the gradient takes most of the time, and one of it shows what there is to see
            layers.append(watched.layers(inputs, None if draw else labels))
            progress.update()
        rows[name] = [average(same) for same in zip(*layers, strict=True)]
    progress.close()
    return rows


_TITLES = (
    f"{'mean':>7}{'var':>8}{'E[z^2]':>8}{'theory':>8}{'corr':>7}{'theory':>8}{'dead':>6}{'grad':>9}"
)


def _cells(row: Row) -> str:
    gradient = "" if row.gradient_norm is None else f"{row.gradient_norm:.2e}"
    return (
        f"{row.mean:7.2f}{row.variance:8.3f}"
        f"{row.second_moment:8.3f}{row.predicted_second_moment:8.3f}"
        f"{row.correlation:7.2f}{row.predicted_correlation:8.2f}{row.dead:6.0%}{gradient:>9}"
    )


def table(rows: dict[str, list[Row]], *, columns: int) -> str:
    """The layers as lines, the methods side by side as far as ``columns`` characters reach."""
    layers = [row.layer for row in next(iter(rows.values()))]
    first = max(len("layer"), *map(len, layers)) + 1
    together = max(1, (columns - first) // (len(_TITLES) + 3))
    methods = list(rows)
    lines = []
    for start in range(0, len(methods), together):
        group = methods[start : start + together]
        lines.append(" " * first + "".join(f" | {m:^{len(_TITLES)}}" for m in group))
        lines.append(f"{'layer':<{first}}" + f" | {_TITLES}" * len(group))
        for index, layer in enumerate(layers):
            cells = "".join(f" | {_cells(rows[m][index])}" for m in group)
            lines.append(f"{layer:<{first}}{cells}")
        lines.append("")
    return "\n".join(lines)


def as_json(rows: dict[str, list[Row]]) -> str:
    """All but the quantiles, which are for the picture, by method; a layer is a line."""
    methods = []
    for method, of_method in rows.items():
        lines = []
        for row in of_method:
            values = dataclasses.asdict(row)
            del values["quantiles"]
            lines.append(json.dumps({k: _rounded(v) for k, v in values.items()}))
        methods.append(f"{json.dumps(method)}: [\n" + ",\n".join(lines) + "\n]")
    return "{" + ",\n".join(methods) + "}\n"


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no infinity
