"""NNGP and NTK of infinitely wide ReLU networks: straight, with weight mean, with BatchNorm.

Equations, lemmas and theorems are those of the paper (Fei et al. 2020); ``docs/theory.md``
follows them one by one, with its slips corrected. All functions work on arrays of correlations,
element by element, and are differentiable; float64 is used where ``jax_enable_x64`` is on.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import scipy.optimize

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.theory.dual import dual_activation, dual_activation_derivative

Kind = Literal["straight", "weight_mean", "batch_norm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Phase = Literal["ordered", "critical", "chaotic"]

_AT_ZERO = 0.5 / math.pi  # dual_activation(0), which centred weights take away
_AT_ONE = 0.5  # dual_activation(1)


class _Transition(NamedTuple):
    """``T(rho) = scale (dual_activation(rho) - offset) + bias``, and ``at_one`` = T(1)."""

    scale: float
    offset: float
    bias: float
    at_one: float


def _transition_of(
    kind: Kind,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> _Transition:
    if kind not in KINDS:
        raise unknown("kind of network", kind, KINDS)
    if kind == "batch_norm":
        if (width, weight_variance, bias_variance) != (None, None, 0.0):
            raise UserError(
                "batch_norm has no width, weight_variance or bias_variance: its transition is that "
                "of infinite width, and BatchNorm takes away the scale and the bias"
            )
        return _Transition(1.0 / (_AT_ONE - _AT_ZERO), _AT_ZERO, 0.0, at_one=1.0)
    if width is not None and width < (smallest := 2 if kind == "weight_mean" else 1):
        raise UserError(f"a layer of a {kind} network has a width of at least {smallest}: {width}")
    if not 0 <= bias_variance < math.inf:
        raise UserError(f"bias_variance = {bias_variance} is not a variance")
    if weight_variance is not None and not 0 <= weight_variance < math.inf:
        raise UserError(f"weight_variance = {weight_variance} is not a variance")
    offset = _AT_ZERO if kind == "weight_mean" else 0.0
    if weight_variance is None and bias_variance > 1:
        raise UserError(
            f"bias_variance = {bias_variance} leaves no stable weight_variance: above 1"
        )
    if weight_variance is None:  # the one that keeps T(1) = 1, whatever the width (Theorem 3)
        scale = (1.0 - bias_variance) / (_AT_ONE - offset)
        return _Transition(scale, offset, bias_variance, at_one=1.0)
    scale = weight_variance * _remaining(kind, width)
    at_one = scale * (_AT_ONE - offset) + bias_variance
    return _Transition(scale, offset, bias_variance, at_one)


def transition(
    rho: jax.typing.ArrayLike,
    kind: Kind,
    *,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> jax.Array:
    """The transition operator: the kernel of the next layer (eqs. 2, 3 and 10).

    ===========  ==========================================================================
    straight     ``s dual(rho) + b`` (eq. 3)
    weight_mean  ``s (n-1)/n (dual(rho) - dual(0)) + b`` (eq. 10 by Lemma 1)
    batch_norm   ``(dual(rho) - dual(0)) / (dual(1) - dual(0))``, the limit of infinitely many
                 uncorrelated inputs (Theorem 2); see ``batch_norm_kernel`` for real batches
    ===========  ==========================================================================

    with s the variance of a weight times the number of inputs (the paper's sigma_w^2), b that of
    a bias (sigma_b^2) and n the number of inputs.

    Args:
      rho: correlations of any shape, of two inputs whose pre-activations have variance 1.
      kind: of the network.
      width: n, for Lemma 1's finite factor; None is infinite width. Without ``weight_variance``
        it changes nothing: the stable variance makes up for it.
      weight_variance: s; None is the stable one, with ``T(1) = 1``: 2 and 2n/((n-1)(1-1/pi))
        where there is no bias (Theorem 3).
      bias_variance: b.

    Raises:
      UserError: a wrong kind or number.
    """
    scale, offset, bias, at_one = _transition_of(kind, width, weight_variance, bias_variance)
    dual = dual_activation(rho)
    # Down from 1, where a rounded 1 would turn the derivative, which falls there like a root.
    return jnp.where(
        dual > _AT_ZERO, at_one - scale * (_AT_ONE - dual), scale * (dual - offset) + bias
    )


def transition_derivative(
    rho: jax.typing.ArrayLike,
    kind: Kind,
    *,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> jax.Array:
    """The derivative of ``transition`` with respect to rho; arguments as there."""
    scale = _transition_of(kind, width, weight_variance, bias_variance).scale
    return scale * dual_activation_derivative(rho)


def stable_weight_variance(kind: Kind, width: int | None = None) -> float:
    """sigma_w^2 of a network without biases that keeps variances (Theorem 3).

    2 for a straight network, ``2n/((n-1)(1-1/pi))`` with weight mean; a weight has this over
    its fan-in. Arguments and errors as for ``transition``.
    """
    scale = _transition_of(kind, width).scale
    return scale / _remaining(kind, width)


def _remaining(kind: Kind, width: int | None) -> float:
    """What centring leaves of the weights' variance (Lemma 1)."""
    return (width - 1) / width if kind == "weight_mean" and width else 1.0


def chi1(
    kind: Kind,
    *,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> float:
    """The derivative of the transition at 1, which decides the phase (Theorems 1 to 3).

    1 for a straight network with sigma_w^2 = 2 (below with a bias: Proposition 1),
    ``1/(1 - 1/pi)`` = 1.467 with weight mean and with BatchNorm. Arguments as for ``transition``.
    """
    scale = _transition_of(kind, width, weight_variance, bias_variance).scale
    return scale / 2.0


def phase(chi1: float, *, tolerance: float = 1e-9) -> Phase:
    """The phase that ``chi1`` puts a deep network in (Theorem 1, Xiao et al. 2019).

    The condition number of the NTK diverges with depth in the ordered phase, ends near a
    multiple of the number of examples on the critical line, and ends at 1 in the chaotic phase.
    """
    if not chi1 >= 0:
        raise UserError(f"chi1 = {chi1} is no derivative of a transition")
    if abs(chi1 - 1.0) <= tolerance:
        return "critical"
    return "ordered" if chi1 < 1.0 else "chaotic"


class FixedPoint(NamedTuple):
    """A correlation that a layer leaves as it is.

    Attributes:
      rho: the correlation.
      derivative: of the transition there.
      stable: whether correlations nearby (in [-1, 1]) come nearer with every layer.
    """

    rho: float
    derivative: float
    stable: bool


def fixed_points(
    kind: Kind,
    *,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> list[FixedPoint]:
    """All fixed points of the transition in [-1, 1], in ascending order (Fig. 4).

    The transition is strictly convex, so there are at most two of them, one on each side of
    where its slope is 1. Arguments as for ``transition``.

    Raises:
      UserError: a wrong kind or number, or T(1) is not 1.
    """
    _check_stable(_transition_of(kind, width, weight_variance, bias_variance))
    options: dict[str, Any] = {
        "width": width,
        "weight_variance": weight_variance,
        "bias_variance": bias_variance,
    }

    def growth(rho: float) -> float:
        return float(transition(rho, kind, **options) - rho)

    # growth falls up to where the transition has slope 1, and rises from there on
    steepest = 2.0 * chi1(kind, **options)
    lowest = -math.cos(2.0 * math.pi / steepest) if steepest > 2.0 else 1.0
    found: list[FixedPoint] = []
    for low, high in ((-1.0, lowest), (lowest, 1.0)):
        rho = _root(growth, low, high)
        if rho is None or any(abs(rho - other.rho) < 1e-6 for other in found):
            continue
        derivative = float(transition_derivative(rho, kind, **options))
        # a convex curve that touches the diagonal draws near from below only: all there is at 1
        touches = abs(derivative - 1.0) < 1e-6 and rho == 1.0
        found.append(FixedPoint(rho, derivative, stable=touches or derivative < 1.0))
    return found


def _check_stable(found: _Transition) -> None:
    """A covariance is a correlation only where the variance stays 1."""
    if abs(found.at_one - 1.0) > 1e-6:
        raise UserError(
            f"T(1) = {found.at_one:.6g}, so variances change from layer to layer and are no "
            "correlations; leave weight_variance out for the stable one"
        )


def _root(function: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a monotonous function is 0 between two points, or touches 0 at one of them."""
    resolution = 4.0 * float(jnp.finfo(jnp.result_type(float)).eps)
    for end in (high, low):
        if abs(function(end)) <= resolution:
            return end
    if function(low) * function(high) > 0:
        return None
    return float(scipy.optimize.brentq(function, low, high, xtol=1e-15))


def nngp(rho0: jax.typing.ArrayLike, depth: int, kind: Kind, **options: Any) -> jax.Array:
    """The correlation after ``depth`` transitions (eq. 2), element by element.

    Args:
      rho0: the correlation of the first layer's pre-activations, K^1 = K^0 in eq. 1: numbers of
        any shape, such as a kernel matrix of a data set with 1 on the diagonal. Within
        some rounding errors of 1 and -1 they count as these: deep chaotic networks tell apart
        what differs by one.
      depth: number of transitions, each a ReLU and a layer; 0 returns ``rho0``.
      kind: of the network.
      options: as for ``transition``.

    Raises:
      UserError: a wrong kind or number, or T(1) is not 1.
    """

    def layer(_: int, correlation: jax.Array) -> jax.Array:
        return transition(correlation, kind, **options)

    return jax.lax.fori_loop(0, _checked(depth, kind, options), layer, _correlations(rho0))


def ntk(rho0: jax.typing.ArrayLike, depth: int, kind: Kind, **options: Any) -> jax.Array:
    """The NTK after ``depth`` transitions, in NTK parameterization (eq. 7), element by element.

    ``Theta^1 = K^1 = rho0`` and ``Theta^{l+1} = K^{l+1} + T'(K^l) Theta^l``: the product in the
    paper's eq. 7 must start at r = l, not l + 1. On the diagonal of a stable network of chi_1
    it is the sum of chi_1^r, such as ``depth + 1`` for a straight one. The derivative with
    respect to ``rho0`` is infinite at 1 and -1, as that of T' is, see
    ``dual_activation_derivative``.

    Arguments, result and errors as for ``nngp``.
    """

    def layer(_: int, kernels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        correlation, tangent = kernels
        after = transition(correlation, kind, **options)
        return after, after + transition_derivative(correlation, kind, **options) * tangent

    rho = _correlations(rho0)
    return jax.lax.fori_loop(0, _checked(depth, kind, options), layer, (rho, rho))[1]


def _checked(depth: Any, kind: Kind, options: dict[str, Any]) -> int:
    if not isinstance(depth, numbers.Integral) or depth < 0:
        raise UserError(f"depth = {depth} is not a number of transitions: an integer, 0 or more")
    _check_stable(_transition_of(kind, **options))
    return int(depth)


def _correlations(rho0: jax.typing.ArrayLike) -> jax.Array:
    """As floating-point numbers, 1 and -1 exactly where they are meant."""
    rho = jnp.asarray(rho0)
    rho = rho.astype(jnp.promote_types(rho.dtype, jnp.float32))
    ends = jnp.where(1.0 - jnp.abs(rho) <= 16 * jnp.finfo(rho.dtype).eps, jnp.sign(rho), rho)
    return rho + jax.lax.stop_gradient(ends - rho)


def condition_number(theta: jax.typing.ArrayLike) -> jax.Array:
    """Largest by smallest eigenvalue of symmetric kernel matrices ``(..., N, N)``.

    Infinite where the smallest is not above 0, as for a singular matrix, by rounding.
    """
    values = jnp.linalg.eigvalsh(jnp.asarray(theta))
    smallest, largest = values[..., 0], values[..., -1]
    positive = smallest > 0
    return jnp.where(positive, largest / jnp.where(positive, smallest, 1.0), jnp.inf)
