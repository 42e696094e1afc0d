"""Figure 5: the variance that residual branches add up to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from mimicnorm_jax.methods import Branch, Method, Site, create_method
from mimicnorm_jax.methods.mimicnorm import WeightMeanOnly
from mimicnorm_jax.models.resnet import Block
from mimicnorm_jax.models.unit import ConvUnit
from mimicnorm_jax.paper.drawing import Data, Numbers, PaperFigure, new_figure

_FEATURES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithoutMultiplier(WeightMeanOnly):
    """Weight mean, with branches that are added as they are."""

    def residual_scale(self, site: Site) -> float | None:
        return None


def _stack(
    method: Method, channels: int, blocks: int, rngs: nnx.Rngs
) -> tuple[ConvUnit, list[Block]]:
    """A stem and basic blocks, all of one shape."""
    site = Site("stem")
    stem = ConvUnit(method, channels, _FEATURES, (3, 3), site=site, padding=1, rngs=rngs)
    shape: dict[str, Any] = {"strides": 1, "bottleneck": False, "projection": False}
    branches = [Branch(index, blocks, layers=2) for index in range(1, blocks + 1)]
    return stem, [
        Block(method, _FEATURES, _FEATURES, branch=branch, rngs=rngs, **shape)
        for branch in branches
    ]


def _moments(method: Method, images: jax.Array, blocks: int, seeds: int) -> dict[str, np.ndarray]:
    """Second moments of branch and sum, ``(seeds, blocks)``, at initialization."""

    @jax.jit
    def run(images: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        stem, stack = _stack(method, images.shape[-1], blocks, nnx.Rngs(key))
        x, found = stem(images), []
        for block in stack:
            branch = x
            for unit in block.branch:
                branch = unit(branch)
            total = block.merge(x, branch)
            found.append({"branch": branch, "sum": total})
            x = block.activation(total)
        return {
            name: jnp.stack([jnp.mean(jnp.square(of_block[name])) for of_block in found])
            for name in ("branch", "sum")
        }

    rows = [run(images, jax.random.key(seed)) for seed in range(seeds)]
    return {name: np.stack([row[name] for row in rows]) for name in ("branch", "sum")}


def _figure5(data: Data, quick: bool) -> Numbers:
    blocks, draws = (8, 2) if quick else (16, 8)
    chosen = data.some(32 if quick else 64)
    methods: dict[str, Method] = {
        "batchnorm": create_method("batchnorm"),
        "multiplier": create_method("weightmean"),
        "no multiplier": _WithoutMultiplier(),
    }
    found: Numbers = {"features": _FEATURES, "initializations": draws, "methods": {}}
    for name, method in methods.items():
        found["methods"][name] = _moments(method, chosen, blocks, draws)
    return found


_LOOKS = {
    "batchnorm": ("#ee6677", "BatchNorm"),
    "multiplier": ("#228833", "weight mean, multiplier 1/√l"),
    "no multiplier": ("#999999", "weight mean, no multiplier"),
}


def _draw_figure5(numbers: Numbers) -> Figure:
    figure = new_figure(9.5, 4.2, "Figure 5: the multiplier does what BatchNorm does to branches")
    left, right = figure.subplots(1, 2)
    for name, found in numbers["methods"].items():
        colour, label = _LOOKS[name]
        total = np.asarray(found["sum"])
        part = np.asarray(found["branch"]) / total
        blocks = np.arange(1, total.shape[1] + 1)
        left.plot(blocks, np.exp(np.log(total).mean(0)), "o-", ms=4, color=colour, label=label)
        right.plot(blocks, part.mean(0), "o-", ms=4, color=colour, label=label)
    right.plot(blocks, 1 / (blocks + 1.0), "k--", lw=0.9, label="1/(l + 1)")
    left.set_yscale("log", base=2)
    left.set_ylabel("second moment after the addition")
    right.set_yscale("log", base=2)
    right.set_ylabel("part of it that the branch adds")
    for axes, place in ((left, "upper left"), (right, "lower left")):
        axes.set_xlabel(f"residual block l ({numbers['features']} channels)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    return figure


FIGURE5 = PaperFigure(
    _figure5,
    _draw_figure5,
    "BatchNorm suppresses the variance of the l-th branch by 1/l; a multiplier 1/sqrt(l) does too",
)
