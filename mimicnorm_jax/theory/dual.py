"""The dual activation of ReLU, the paper's eq. 4, exact and differentiable up to its ends."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# sin t - t cos t = sum over k of this times t^(2k+1): below 1 the difference would cancel
_SERIES = [(-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 11)]


def _angle(rho: jax.Array) -> jax.Array:
    """arccos(-rho), exact near -1 and 1 as well; what lies outside counts as the end."""
    rho = jnp.clip(rho, -1.0, 1.0)
    return jnp.atan2(jnp.sqrt((1.0 - rho) * (1.0 + rho)), -rho)


def _as_float(rho: jax.typing.ArrayLike) -> jax.Array:
    rho = jnp.asarray(rho)
    return rho.astype(jnp.promote_types(rho.dtype, jnp.float32))


@jax.custom_jvp
def _dual(rho: jax.Array) -> jax.Array:
    angle = _angle(rho)
    small = jnp.minimum(angle, 1.0)
    square = jnp.square(small)
    series = small * square * jnp.polyval(jnp.array(_SERIES[::-1], rho.dtype), square)
    plain = jnp.sin(angle) - angle * jnp.cos(angle)
    return jnp.where(angle < 1.0, series, plain) / (2.0 * jnp.pi)


@jax.custom_jvp
def _slope(rho: jax.Array) -> jax.Array:
    return _angle(rho) / (2.0 * jnp.pi)


@_dual.defjvp
def _dual_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (rho,), (tangent,) = primals, tangents
    return _dual(rho), _slope(rho) * tangent


@_slope.defjvp
def _slope_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (rho,), (tangent,) = primals, tangents
    # Infinite at the ends; a number instead that a tangent of 0, or of rounding alone as of
    # the diagonal of a data set's kernel, does not turn into more than rounding.
    square = jnp.maximum((1.0 - rho) * (1.0 + rho), jnp.finfo(rho.dtype).eps)
    return _slope(rho), tangent / (2.0 * jnp.pi * jnp.sqrt(square))


def dual_activation(rho: jax.typing.ArrayLike) -> jax.Array:
    """``E[relu(u) relu(v)]`` of standard Gaussians u and v of correlation rho (eq. 4).

    ``(sqrt(1 - rho^2) + (pi - arccos(rho)) rho) / (2 pi)``, from Cho and Saul (2009): 0 at -1,
    1/(2 pi) at 0, 1/2 at 1.

    Args:
      rho: correlations of any shape; what rounding has put outside of [-1, 1] counts as -1 or 1.

    Returns:
      An array of the same shape, of at least float32; float64 where ``jax_enable_x64`` is on.
      Its relative error is that of the type at every rho, also next to -1 where it vanishes.
    """
    return _dual(_as_float(rho))


def dual_activation_derivative(rho: jax.typing.ArrayLike) -> jax.Array:
    """The derivative of ``dual_activation``: ``(pi - arccos(rho)) / (2 pi)``.

    It is ``E[1(u > 0) 1(v > 0)]``: 0 at -1, 1/4 at 0, 1/2 at 1. Its own derivative is infinite
    at both ends; within rounding errors of them it is ``1/(2 pi sqrt(eps))``.

    Args:
      rho: as for ``dual_activation``.

    Returns:
      An array of the shape of ``rho``, of at least float32.
    """
    return _slope(_as_float(rho))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of variances; 0 with a derivative of 0 where there is none."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
