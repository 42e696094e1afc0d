"""Any activation φ on Gaussians, by quadrature, and the variance of weights behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[jax.Array], jax.Array]

_REACH = 10  # the density beyond it is below 1e-22
_PANELS = 4 * _REACH  # ends at multiples of 1/2: there are the kinks of ReLU, ReLU6, hard swish, …
_ORDER = 20


class Moments(NamedTuple):
    """Expectations over a standard Gaussian z.

    Attributes:
      mean: E φ(z).
      second: E φ(z)².
      slope: E φ'(z)².
    """

    mean: float
    second: float
    slope: float

    @property
    def variance(self) -> float:
        """Var φ(z), of which a centred kernel makes its output."""
        return self.second - self.mean**2

    def seen(self, *, centered: bool) -> float:
        """What a kernel sees of φ(z): the variance where it is centred, else the second moment."""
        return self.variance if centered else self.second


IDENTITY = Moments(0.0, 1.0, 1.0)


@functools.cache
def gaussian_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes ``(N,)`` and weights ``(N,)``, so that ``weights @ f(nodes)`` is ``E f(z)``.

    Gauss-Legendre on panels that end at multiples of 1/2: exact to rounding for what is smooth
    between these. float64.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    ends = np.linspace(-_REACH, _REACH, _PANELS + 1)
    half = np.diff(ends)[:, None] / 2
    z = (ends[:-1, None] + half * (nodes + 1)).ravel()
    density = np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)
    return z, (half * weights).ravel() * density


def activation_moments(phi: Activation) -> Moments:
    """E φ(z), E φ(z)² and E φ'(z)² of a standard Gaussian z.

    Args:
      phi: acts on each element of an array; kinks and steps at multiples of 1/2 are exact, others
        are to about 1e-3.

    Raises:
      ValueError: φ is not finite for some finite z.
    """
    z, weights = gaussian_quadrature()
    nodes = jnp.asarray(z)
    values, slopes = jax.jvp(phi, (nodes,), (jnp.ones_like(nodes),))
    if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
        raise ValueError("the activation is not finite between -10 and 10")
    y, dy = np.asarray(values, np.float64), np.asarray(slopes, np.float64)
    return Moments(float(weights @ y), float(weights @ y**2), float(weights @ dy**2))


def stable_variance_of(moments: Moments, fan_in: int, *, centered: bool) -> float:
    """Initial variance of a weight that keeps the second moment behind any activation.

    ``1 / ((n-1) Var φ(z))`` for a centred kernel and ``1 / (n E φ(z)²)`` for a plain one. With
    ReLU it is ``stable_variance``: the paper's Section 4, and He's.

    Args:
      moments: of the activation before the layer, see ``activation_moments``.
      fan_in: n, the number of weights of one output channel.
      centered: whether the kernel is centred.

    Raises:
      ValueError: the fan-in is too small (a centred kernel has at least 2), or nothing comes
        through the activation.
    """
    weights = fan_in - 1 if centered else fan_in
    seen = moments.seen(centered=centered)
    if weights < 1:
        raise ValueError(f"fan_in must be at least {2 if centered else 1}, got {fan_in}")
    if not seen > 1e-12:
        raise ValueError("nothing comes through the activation: its variance is 0")
    return 1.0 / (weights * seen)
