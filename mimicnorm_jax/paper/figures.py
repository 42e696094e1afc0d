"""All figures, by name."""

from __future__ import annotations

from mimicnorm_jax.paper import depth, last_bn, residual, transitions
from mimicnorm_jax.paper.drawing import PaperFigure

FIGURES: dict[str, PaperFigure] = {
    "figure2": depth.FIGURE2,
    "figure3": depth.FIGURE3,
    "figure4": transitions.FIGURE4,
    "figure5": residual.FIGURE5,
    "figure8": depth.FIGURE8,
    "figure9": depth.FIGURE9,
    "figure10": last_bn.FIGURE10,
    "conditioning": transitions.CONDITIONING,
}
