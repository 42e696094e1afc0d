"""Figures 2, 3, 8 and 9: what depth does to the activations of fully connected networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from mimicnorm_jax.paper.drawing import COLOURS, NAMES, Data, Numbers, PaperFigure, new_figure
from mimicnorm_jax.theory.finite import layer_outputs, mlp
from mimicnorm_jax.theory.kernels import Kind, nngp

WIDTH = 300  # Appendix B.1
LAYERS = 51  # Section 3
_CHANNELS = 30
_QUANTILES = (5, 25, 50, 75, 95)
_PAIRS = 200


def _layers(kind: Kind, images: jax.Array, count: int) -> list[jax.Array]:
    """The hidden layers of a network of ``count`` dense layers at initialization."""
    model = mlp(kind, count - 2, WIDTH, *images.shape[2:])(nnx.Rngs(0))
    # not as one program: its layers would each be compiled, here all are the same few operations
    return layer_outputs(model, images)  # type: ignore[arg-type]


def _channels_of(kind: Kind, layers: tuple[int, ...], data: Data, quick: bool) -> Numbers:
    outputs = _layers(kind, data.some(500 if quick else 2000), LAYERS)
    found = []
    for layer in layers:
        h = np.asarray(outputs[layer - 1])
        chosen = np.random.default_rng(layer).permutation(WIDTH)[:_CHANNELS]
        found.append(
            {
                "kind": kind,
                "layer": layer,
                "images": len(h),
                "quantiles": np.percentile(h[:, chosen], _QUANTILES, axis=0).T,
                # of the variance of all values, what lies between the channels' means
                "between_channels": float(np.var(h.mean(0)) / np.var(h)),
            }
        )
    return {"panels": found}


def _draw_channels(numbers: Numbers, title: str) -> Figure:
    figure = new_figure(10, 4, title)
    axes: Any = figure.subplots(1, len(numbers["panels"]), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, numbers["panels"], strict=True):
        boxes = [
            {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high, "fliers": []}
            for low, q1, median, q3, high in np.asarray(panel["quantiles"])
        ]
        colour = COLOURS[panel["kind"]]
        axis.bxp(
            boxes,
            showfliers=False,
            widths=0.7,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.5, "lw": 0.6},
            medianprops={"color": "black"},
            whiskerprops={"lw": 0.6},
        )
        axis.axhline(0, color="grey", lw=0.6)
        axis.set_xticks([])
        axis.set_xlabel(f"{len(boxes)} of {WIDTH} channels, {panel['images']} images")
        axis.set_title(
            f"{NAMES[panel['kind']]}, layer {panel['layer']}: "
            f"{100 * panel['between_channels']:.0f} % of the variance is between channels",
            fontsize=9,
        )
    axes[0].set_ylabel("pre-activation (boxes: middle half; lines: 5 to 95 %)")
    return figure


FIGURE2 = PaperFigure(
    lambda data, quick: _channels_of("straight", (20, 50), data, quick),
    lambda numbers: _draw_channels(
        numbers, "Figure 2: a straight network correlates activations with depth"
    ),
    "values within a channel draw together and channels draw apart as a straight network deepens",
)


def _figure3(data: Data, quick: bool) -> Numbers:
    panels = []
    for kind in ("batch_norm", "weight_mean"):
        panels += _channels_of(kind, (50,), data, quick)["panels"]  # type: ignore[arg-type]
    return {"panels": panels}


FIGURE3 = PaperFigure(
    _figure3,
    lambda numbers: _draw_channels(
        numbers, "Figure 3: BatchNorm and weight mean keep all channels alike"
    ),
    "with BatchNorm and with weight mean every channel of layer 50 has the same distribution",
)


def _correlations(kinds: tuple[Kind, ...], data: Data, quick: bool) -> Numbers:
    """Of pairs of images through the layers."""
    pairs = data.some(2 * _PAIRS)
    pairs = pairs[: len(pairs) // 2 * 2]
    found: Numbers = {"width": WIDTH, "kinds": {}}
    for kind in kinds:
        outputs = _layers(kind, pairs, 22 if quick else LAYERS)
        rows = [np.asarray(_pearson(h[0::2], h[1::2])) for h in outputs]
        start = np.asarray(
            _pearson(*(jnp.reshape(x, (len(x), -1)) for x in (pairs[::2], pairs[1::2])))
        )
        expected = [np.asarray(nngp(rows[0], layer, kind)) for layer in range(len(rows))]
        found["kinds"][kind] = {
            "input": start,
            "correlation": np.stack(rows),  # (layers, pairs)
            "theory": np.stack(expected).mean(1),
        }
    return found


def _pearson(a: jax.Array, b: jax.Array) -> jax.Array:
    """The correlation coefficients of rows."""
    a, b = (x - jnp.mean(x, axis=1, keepdims=True) for x in (a, b))
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / norms


def _draw_correlations(numbers: Numbers, title: str) -> Figure:
    kinds = numbers["kinds"]
    figure = new_figure(5.5 * max(1, len(kinds)), 4, title)
    axes: Any = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, (kind, found) in zip(axes, kinds.items(), strict=True):
        rows = np.asarray(found["correlation"])
        layers = np.arange(1, len(rows) + 1)
        axis.plot(layers, rows, color=COLOURS[kind], lw=0.5, alpha=0.25)
        axis.plot([], [], color=COLOURS[kind], label=f"{rows.shape[1]} pairs of images")
        axis.plot(layers, rows.mean(1), color="black", label="their mean")
        axis.plot(
            layers, found["theory"], color="black", ls="--", label="mean, by the infinite width"
        )
        axis.set_title(f"{NAMES[kind]}, width {numbers['width']}", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylim(-1.05, 1.05)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("correlation of two images' pre-activations")
    return figure


FIGURE8 = PaperFigure(
    lambda data, quick: _correlations(("straight",), data, quick),
    lambda numbers: _draw_correlations(
        numbers, "Figure 8: in a straight network all images become one"
    ),
    "activations of all pairs tend to be identical as the depth of a straight network grows",
)
FIGURE9 = PaperFigure(
    lambda data, quick: _correlations(("batch_norm", "weight_mean"), data, quick),
    lambda numbers: _draw_correlations(
        numbers, "Figure 9: BatchNorm and weight mean decorrelate images"
    ),
    "networks with BatchNorm and weight mean evolve alike; correlations concentrate in [-0.2, 0.2]",
)
