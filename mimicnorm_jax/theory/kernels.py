"""NNGP and NTK of infinitely wide ReLU networks: straight, with weight mean, with BatchNorm.

Equations, lemmas and theorems are those of the paper (Fei et al. 2020); ``docs/theory.md``
follows them one by one, with its slips corrected. All functions work on arrays of correlations,
element by element, and are differentiable; float64 is used where ``jax_enable_x64`` is on.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.theory.dual import dual_activation, dual_activation_derivative

Kind = Literal["straight", "weight_mean", "batch_norm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Phase = Literal["ordered", "critical", "chaotic"]

_AT_ZERO = 0.5 / math.pi  # dual_activation(0), which centred weights take away
_AT_ONE = 0.5  # dual_activation(1)


class _Transition(NamedTuple):
    """``T(rho) = scale (dual_activation(rho) - offset) + bias``, and ``at_one`` = T(1).

    Numbers, or arrays with one for every layer.
    """

    scale: Any
    offset: Any
    bias: Any
    at_one: Any

    def after(self, variance: float) -> _Transition:
        """That of the correlation, where pre-activations have this variance, not 1.

        The covariance becomes ``variance scale (dual(rho) - offset) + bias``; this is it over the
        variance that it has at 1.
        """
        growth = self.growth(variance)
        bias = self.bias / variance if self.bias else 0.0
        return _Transition(self.scale / growth, self.offset, bias / growth, at_one=1.0)

    def growth(self, variance: float) -> float:
        """By what a layer multiplies the variance of the pre-activations."""
        if variance == 1.0:
            return float(self.at_one)
        kept = self.scale * (_AT_ONE - self.offset)
        return float(kept + self.bias / variance if self.bias else kept)


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

    Returns:
      An array of the shape of ``rho``.

    Raises:
      UserError: a wrong kind or number.
    """
    return _apply(_transition_of(kind, width, weight_variance, bias_variance), rho)


def _apply(found: _Transition, rho: jax.typing.ArrayLike) -> jax.Array:
    dual = dual_activation(rho)
    # Down from 1, where a rounded 1 would turn the derivative, which falls there like a root.
    return jnp.where(
        dual > _AT_ZERO,
        found.at_one - found.scale * (_AT_ONE - dual),
        found.scale * (dual - found.offset) + found.bias,
    )


def transition_derivative(
    rho: jax.typing.ArrayLike,
    kind: Kind,
    *,
    width: int | None = None,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> jax.Array:
    """The derivative of ``transition`` with respect to rho.

    Args:
      rho, kind, width, weight_variance, bias_variance: as for ``transition``.

    Returns:
      An array of the shape of ``rho``.

    Raises:
      UserError: as ``transition``.
    """
    scale = _transition_of(kind, width, weight_variance, bias_variance).scale
    return scale * dual_activation_derivative(rho)


def stable_weight_variance(kind: Kind, width: int | None = None) -> float:
    """sigma_w^2 of a network without biases that keeps variances (Theorem 3).

    2 for a straight network, ``2n/((n-1)(1-1/pi))`` with weight mean; a weight has this over
    its fan-in.

    Args:
      kind, width: as for ``transition``.

    Raises:
      UserError: as ``transition``.
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
    """The derivative at 1 of the correlation's transition, which decides the phase (Theorem 1).

    1 for a straight network without biases and below 1 with them (Proposition 1);
    ``1/(1 - 1/pi)`` = 1.467 with weight mean (Theorem 3) and with BatchNorm (Theorem 2). It is
    half of ``weight_variance`` where the variance of the pre-activations comes to rest above 0.
    Where it vanishes or grows without end, what a bias adds or how large the weights are does
    not matter to correlations: there it is as without a bias.

    Args:
      kind, width, weight_variance, bias_variance: as for ``transition``.

    Raises:
      UserError: as ``transition``, and where neither weights nor biases are left.
    """
    return _in_the_limit(_transition_of(kind, width, weight_variance, bias_variance)).scale / 2.0


def _in_the_limit(found: _Transition) -> _Transition:
    """The correlation's transition in deep layers, whose variance has come to rest or grown."""
    _check_alive(found)
    kept = found.scale * (_AT_ONE - found.offset)
    if found.at_one == 1.0:
        return found
    at_rest = found.bias / (1.0 - kept) if kept < 1.0 else math.inf
    return found.after(at_rest or 1.0)  # without a bias every variance has the same


def _check_alive(found: _Transition) -> None:
    if not found.at_one > 0:
        raise UserError("weight_variance = 0 without a bias: every output is 0")


def phase(chi1: float, *, tolerance: float = 1e-9) -> Phase:
    """The phase that ``chi1`` puts a deep network in (Theorem 1, Xiao et al. 2019).

    The condition number of the NTK diverges with depth in the ordered phase, ends near a
    multiple of the number of examples on the critical line, and ends at 1 in the chaotic phase.

    Args:
      chi1: as the function of this name returns it.
      tolerance: how far from 1 still counts as 1.

    Returns:
      ``"ordered"`` below 1, ``"critical"`` at 1, ``"chaotic"`` above.

    Raises:
      UserError: a negative number, or NaN.
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
    """All fixed points of the correlation's transition in [-1, 1], in ascending order (Fig. 4).

    1 always is one, the only one where ``chi1`` is at most 1. With ``rho = cos t`` the other
    solves ``(1 - cos t)(1 - 1/chi_1) = (sin t - t cos t) / pi``.

    Args:
      kind, width, weight_variance, bias_variance: as for ``chi1``.

    Raises:
      UserError: as ``chi1``.
    """
    slope = chi1(kind, width=width, weight_variance=weight_variance, bias_variance=bias_variance)
    angle = _meeting(slope)
    rho = math.cos(angle)
    if rho == 1.0:  # the transition touches the diagonal from above, or as good as
        return [FixedPoint(1.0, slope, stable=True)]
    lower = FixedPoint(rho, slope * (1.0 - angle / math.pi), stable=True)
    return [lower, FixedPoint(1.0, slope, stable=False)]


def _meeting(slope: float) -> float:
    """The angle t > 0 of the lower fixed point, 0 where there is none."""
    if slope <= 1.0:
        return 0.0

    def excess(angle: float) -> float:
        # sin t - t cos t is t^2 j_1(t), which does not cancel
        curved = angle**2 * scipy.special.spherical_jn(1, angle) / math.pi
        return curved - 2.0 * math.sin(angle / 2.0) ** 2 * (1.0 - 1.0 / slope)

    # it is about t^2 (2 t / (3 pi) - (1 - 1/slope)) / 2 and negative at half of where that is 0
    low = 0.75 * math.pi * (1.0 - 1.0 / slope)
    return float(scipy.optimize.brentq(excess, low, math.pi, xtol=1e-15))


def nngp(rho0: jax.typing.ArrayLike, depth: int, kind: Kind, **options: Any) -> jax.Array:
    """The NNGP kernel after ``depth`` transitions (eq. 2), element by element.

    Args:
      rho0: the correlation of the first layer's pre-activations, K^1 = K^0 in eq. 1: numbers of
        any shape, such as a kernel matrix of a data set with 1 on the diagonal. Within
        some rounding errors of 1 and -1 they count as these: deep chaotic networks tell apart
        what differs by one.
      depth: number of transitions, each a ReLU and a layer; 0 returns ``rho0``.
      kind: of the network.
      options: as for ``transition``. With a ``weight_variance`` that does not keep the
        variance at 1, it is carried along; it may vanish or overflow in deep networks.

    Returns:
      Covariances, which are correlations where ``T(1) = 1``; else divide by ``nngp(1.0, ...)``.

    Raises:
      UserError: a wrong kind or number, or neither weights nor biases.
    """
    return _kernels(rho0, depth, kind, options)[0]


def ntk(rho0: jax.typing.ArrayLike, depth: int, kind: Kind, **options: Any) -> jax.Array:
    """The NTK after ``depth`` transitions, in NTK parameterization (eq. 7), element by element.

    ``Theta^1 = K^1 = rho0`` and ``Theta^{l+1} = K^{l+1} + T'(K^l) Theta^l``: the product in the
    paper's eq. 7 must start at r = l, not l + 1. On the diagonal of a stable network of chi_1
    it is the sum of chi_1^r, such as ``depth + 1`` for a straight one. The derivative with
    respect to ``rho0`` is infinite at 1 and -1, as that of T' is, see
    ``dual_activation_derivative``.

    Args:
      rho0, depth, kind, options: as for ``nngp``.

    Returns:
      An array of the shape of ``rho0``.

    Raises:
      UserError: as ``nngp``.
    """
    return _kernels(rho0, depth, kind, options)[1]


def _kernels(
    rho0: jax.typing.ArrayLike, depth: Any, kind: Kind, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Both kernels: their correlations layer by layer, times the variance at the end."""
    if not isinstance(depth, numbers.Integral) or depth < 0:
        raise UserError(f"depth = {depth} is not a number of transitions: an integer, 0 or more")
    found = _transition_of(kind, **options)
    _check_alive(found)
    variance, layers = 1.0, []
    for _ in range(int(depth)):
        layers.append(found.after(variance))
        variance *= found.growth(variance)

    def layer(
        kernels: tuple[jax.Array, jax.Array], step: _Transition
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        correlation, tangent = kernels
        after = _apply(step, correlation)
        slope = step.scale * dual_activation_derivative(correlation)
        return (after, after + slope * tangent), None

    rho = _correlations(rho0)
    steps = _Transition(*np.asarray(layers, rho.dtype).reshape(-1, 4).T)
    (correlation, tangent), _ = jax.lax.scan(layer, (rho, rho), steps)
    return variance * correlation, variance * tangent


def _correlations(rho0: jax.typing.ArrayLike) -> jax.Array:
    """As floating-point numbers, 1 and -1 exactly where they are meant."""
    rho = jnp.asarray(rho0)
    rho = rho.astype(jnp.promote_types(rho.dtype, jnp.float32))
    ends = jnp.where(1.0 - jnp.abs(rho) <= 16 * jnp.finfo(rho.dtype).eps, jnp.sign(rho), rho)
    return rho + jax.lax.stop_gradient(ends - rho)


def condition_number(theta: jax.typing.ArrayLike) -> jax.Array:
    """Largest by smallest eigenvalue of symmetric kernel matrices.

    Args:
      theta: ``(..., N, N)``.

    Returns:
      ``(...)``; infinite where the smallest eigenvalue is not above 0, as for a singular matrix,
      by rounding.
    """
    values = jnp.linalg.eigvalsh(jnp.asarray(theta))
    smallest, largest = values[..., 0], values[..., -1]
    positive = smallest > 0
    return jnp.where(positive, largest / jnp.where(positive, smallest, 1.0), jnp.inf)
