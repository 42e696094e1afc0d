"""Distributions over channels, as functions of a standard Gaussian.

A marginal F is a nondecreasing function: ``F(z)`` with ``z ~ N(0, 1)`` has the distribution
that it stands for. It is held by its values ``(G,)`` at ``GRID``. Two positions whose z have
correlation rho are a Gaussian copula with this marginal; for F = ReLU their mean product is
the arc-cosine kernel (Cho and Saul 2009), the paper's eq. 4.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

_POINTS = 257
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()

GRID = np.linspace(-6.0, 6.0, _POINTS)
_WEIGHTS = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()
# Finer towards -1 and 1, where ReLU's kernel has its square-root singularity.
CORRELATIONS = -np.cos(np.linspace(0.0, math.pi, 65))


def gaussian() -> jax.Array:
    """The standard Gaussian itself: F(z) = z."""
    return jnp.asarray(GRID, jnp.float32)


def expectation(values: jax.Array) -> jax.Array:
    """E[F(z)] for ``(..., G)`` values."""
    return values @ jnp.asarray(_WEIGHTS, values.dtype)


def normalize(marginal: jax.Array) -> jax.Array:
    """Scales to second moment 1; zero stays zero."""
    moment = expectation(jnp.square(marginal))
    return marginal / jnp.sqrt(jnp.where(moment > 0, moment, 1.0))


def from_sample(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The marginal of weighted values, both ``(N,)``."""
    order = jnp.argsort(values)
    values, weights = values[order], weights[order]
    cumulative = (jnp.cumsum(weights) - weights / 2) / jnp.sum(weights)
    return jnp.interp(norm.cdf(gaussian()), cumulative, values)


def sum_of(a: jax.Array, b: jax.Array) -> jax.Array:
    """The marginal of the sum of two independent variables."""
    weights = np.multiply.outer(_WEIGHTS, _WEIGHTS).ravel()
    return from_sample(jnp.add.outer(a, b).ravel(), jnp.asarray(weights, a.dtype))


def mixture_of(a: jax.Array, b: jax.Array, fraction: jax.Array | float) -> jax.Array:
    """The marginal of channels of which ``fraction`` are distributed as a, the rest as b."""
    weights = jnp.asarray(_WEIGHTS, a.dtype)
    return from_sample(
        jnp.concatenate([a, b]), jnp.concatenate([fraction * weights, (1 - fraction) * weights])
    )


def correlation_table(marginal: jax.Array) -> jax.Array:
    """``E[F(z) F(z')] / E[F(z)^2]`` at each of ``CORRELATIONS`` of z and z': increasing."""
    z = gaussian()
    rho = jnp.asarray(CORRELATIONS, z.dtype)[:, None, None]
    nodes = jnp.asarray(_NODES, z.dtype)[None, None]
    other = rho * z[None, :, None] + jnp.sqrt(1 - rho**2) * nodes  # (R, G, nodes)
    conditional = jnp.interp(other, z, marginal) @ jnp.asarray(_NODE_WEIGHTS, z.dtype)
    moment = expectation(jnp.square(marginal))
    table = expectation(marginal[None] * conditional) / jnp.where(moment > 0, moment, 1.0)
    return table.at[-1].set(1.0)


def copula_correlation(cosine: jax.Array, table: jax.Array) -> jax.Array:
    """The correlation of z that gives ``cosine``, by the table of the marginal."""
    return jnp.interp(cosine, table, jnp.asarray(CORRELATIONS, table.dtype))


def cosine_of(correlation: jax.Array, table: jax.Array) -> jax.Array:
    """The inverse of ``copula_correlation``."""
    return jnp.interp(correlation, jnp.asarray(CORRELATIONS, table.dtype), table)


@functools.cache
def _maximum_of_independent(count: int) -> np.ndarray:
    """The marginal ``(G,)`` of the maximum of independent standard Gaussians."""
    cdf = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in GRID])
    return np.interp(cdf, cdf**count, GRID)


def maximum_variance(count: int) -> float:
    """Variance of the maximum of ``count`` independent standard Gaussians."""
    values = _maximum_of_independent(count)
    return float(values**2 @ _WEIGHTS - (values @ _WEIGHTS) ** 2)


def maximum_of(marginal: jax.Array, count: int, rho: jax.Array) -> jax.Array:
    """The marginal of the maximum of ``count`` values, every two with correlation ``rho``.

    Their z are ``sqrt(rho) z0 + sqrt(1 - rho) z_i``; as F increases, the maximum of the
    values is F of the maximum of the z.
    """
    z = gaussian()
    top = jnp.asarray(_maximum_of_independent(count), z.dtype)
    highest = sum_of(jnp.sqrt(rho) * z, jnp.sqrt(1 - rho) * top)
    return jnp.interp(highest, z, marginal)
