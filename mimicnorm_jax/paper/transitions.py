"""Figure 4, the transition operators; and the conditioning of the NTK, which the paper lacks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mimicnorm_jax.paper.drawing import COLOURS, NAMES, Data, Numbers, PaperFigure, new_figure
from mimicnorm_jax.theory.finite import empirical_kernels, mlp, pre_activations
from mimicnorm_jax.theory.kernels import (
    KINDS,
    Kind,
    chi1,
    condition_number,
    fixed_points,
    ntk,
    phase,
    transition,
)

_SHOWN: tuple[Kind, ...] = ("straight", "weight_mean")  # BatchNorm's limit is weight mean's


def _figure4(data: Data, quick: bool) -> Numbers:
    del data, quick  # closed forms
    rho = np.linspace(-1, 1, 401)
    return {
        "rho": rho,
        "kinds": {
            kind: {
                "transition": np.asarray(transition(rho, kind)),
                "chi1": chi1(kind),
                "phase": phase(chi1(kind)),
                "fixed_points": [point._asdict() for point in fixed_points(kind)],
            }
            for kind in _SHOWN
        },
    }


def _draw_figure4(numbers: Numbers) -> Figure:
    figure = new_figure(5.5, 5, "Figure 4: transition operators and their fixed points")
    axes = figure.subplots()
    axes.plot([-1, 1], [-1, 1], color="grey", lw=0.8, ls=":", label="T(ρ) = ρ")
    for kind, found in numbers["kinds"].items():
        label = f"{NAMES[kind]}: χ₁ = {found['chi1']:.3f}, {found['phase']}"
        axes.plot(numbers["rho"], found["transition"], color=COLOURS[kind], label=label)
        for point in found["fixed_points"]:
            axes.plot(
                point["rho"],
                point["rho"],
                "o",
                ms=9 if kind == "straight" else 6,
                color=COLOURS[kind],
                mfc=COLOURS[kind] if point["stable"] else "white",
            )
    axes.plot([], [], "o", color="black", label="stable fixed point")
    axes.plot([], [], "o", color="black", mfc="white", label="unstable fixed point")
    axes.set_xlabel("correlation ρ in a layer")
    axes.set_ylabel("correlation T(ρ) in the next")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    return figure


FIGURE4 = PaperFigure(
    _figure4,
    _draw_figure4,
    "weight mean moves the stable fixed point from 1 to 0, and has chi_1 > 1",
)


class Size(NamedTuple):
    """How large an estimate of kernels is."""

    batch: int
    width: int
    draws: int
    depths: tuple[int, ...]


QUICK = Size(16, 128, 8, (0, 1, 2, 4, 8))
FULL = Size(32, 256, 20, (0, 1, 2, 4, 8, 16, 24))


def _conditioning(data: Data, quick: bool) -> Numbers:
    """Of real networks, and of the element-wise theory from their first layer's kernel."""
    batch, width, draws, depths = QUICK if quick else FULL
    chosen = data.some(batch)
    batch = len(chosen)  # of a small data set
    found: Numbers = {
        "depths": depths,
        "images": batch,
        "width": width,
        "initializations": draws,
        "kinds": {},
    }
    for kind in KINDS:
        measured, theory = [], []
        vectors = np.asarray(chosen, np.float64).reshape(batch, -1)
        if kind != "straight":  # what a centred layer, and BatchNorm, take away
            vectors = vectors - vectors.mean(axis=1 if kind == "weight_mean" else 0, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        for depth in depths:
            estimate = empirical_kernels(
                mlp(kind, depth, width, *chosen.shape[2:]),
                chosen,
                outputs=pre_activations(depth),
                count=draws,
                directions=4,
            ).ntk
            assert estimate is not None
            kernel = estimate.mean
            if kind == "batch_norm":  # its outputs have no mean over the batch: one eigenvalue is 0
                kernel = _without_mean(kernel)
            measured.append(float(condition_number(kernel)))
            of_theory = condition_number(ntk(jnp.asarray(vectors @ vectors.T), depth, kind))
            # vectors without a mean over the batch have a singular kernel
            singular = kind == "batch_norm" and depth == 0
            theory.append(np.inf if singular else float(of_theory))
        found["kinds"][kind] = {"measured": measured, "theory": theory}
    return found


def _without_mean(kernel: np.ndarray) -> np.ndarray:
    """The kernel on the space of vectors of mean 0."""
    batch = len(kernel)
    basis = np.linalg.svd(np.eye(batch) - 1.0 / batch)[0][:, : batch - 1]
    return basis.T @ kernel @ basis


def _draw_conditioning(numbers: Numbers) -> Figure:
    figure = new_figure(6.5, 4.5, "Condition number of the NTK against depth")
    axes = figure.subplots()
    for kind, found in numbers["kinds"].items():
        label = f"{NAMES[kind]}, {numbers['initializations']} networks of width {numbers['width']}"
        axes.plot(numbers["depths"], found["measured"], "o-", color=COLOURS[kind], label=label)
        axes.plot(numbers["depths"], found["theory"], "--", color=COLOURS[kind], lw=0.9)
    axes.plot([], [], "--", color="black", label="element-wise theory (eq. 7, corrected)")
    # Off the diagonal, a straight network's kernel tends to a quarter of the diagonal.
    limit = 1 + numbers["images"] / 3
    axes.axhline(limit, color=COLOURS["straight"], ls=":", lw=0.9)
    label = "straight, infinitely deep: 1 + B/3"
    axes.text(numbers["depths"][-1], limit, label, fontsize=7, ha="right", va="bottom")
    axes.set_yscale("log")
    axes.set_xlabel("number of ReLUs")
    axes.set_ylabel(f"condition number, {numbers['images']} images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    return figure


CONDITIONING = PaperFigure(
    _conditioning,
    _draw_conditioning,
    "a straight network's NTK stays badly conditioned; BatchNorm's and weight mean's get better",
)
