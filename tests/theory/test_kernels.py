"""The closed forms, against definitions, independent numbers and automatic differentiation."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.theory.dual import dual_activation, dual_activation_derivative
from mimicnorm_jax.theory.kernels import (
    KINDS,
    chi1,
    condition_number,
    fixed_points,
    nngp,
    ntk,
    phase,
    stable_weight_variance,
    transition,
    transition_derivative,
)
from mimicnorm_jax.theory.patches import conv_kernels

REFERENCE = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "reference_kernels.json").read_text()
)
CHI = 1 / (1 - 1 / math.pi)
ENDS = np.array([-1.0, -1 + 1e-12, -1 + 1e-6, -0.3, 0.0, 0.7, 1 - 1e-6, 1 - 1e-12, 1.0])


@pytest.mark.parametrize("depth", REFERENCE["dense"])
def test_dense_kernels_are_those_of_neural_tangents(depth, float64):
    vectors = np.array(REFERENCE["vectors"])
    rho0 = vectors @ vectors.T / vectors.shape[1]
    expected = REFERENCE["dense"][depth]
    np.testing.assert_allclose(nngp(rho0, int(depth), "straight"), expected["nngp"], atol=1e-12)
    np.testing.assert_allclose(ntk(rho0, int(depth), "straight"), expected["ntk"], rtol=1e-6)


@pytest.mark.parametrize("depth", REFERENCE["convolutional"])
def test_convolutional_kernels_are_those_of_neural_tangents(depth, float64):
    got = conv_kernels(jnp.array(REFERENCE["images"]), int(depth), "straight")
    expected = REFERENCE["convolutional"][depth]
    np.testing.assert_allclose(got[0], expected["nngp"], rtol=1e-12)
    np.testing.assert_allclose(got[1], expected["ntk"], rtol=1e-6)


def test_the_dual_activation_is_exact_up_to_its_ends(float64):
    assert [float(dual_activation(r)) for r in (-1.0, 1.0)] == [0.0, 0.5]
    assert dual_activation(0.0) == pytest.approx(1 / (2 * math.pi), rel=1e-15)
    # of the angle t from -1 it is (sin t - t cos t) / 2 pi, near -1 t^3 / 6 pi
    for t in (1e-7, 1e-4, 1e-2):
        expected = t**3 / (6 * math.pi) * (1 - t**2 / 10)
        rho = -1 + 2 * math.sin(t / 2) ** 2
        rounded = 2 * math.asin(math.sqrt((1 + rho) / 2))  # the angle of what is left of rho
        expected *= (rounded / t) ** 3
        assert dual_activation(rho) == pytest.approx(expected, rel=1e-8)
        assert dual_activation_derivative(rho) == pytest.approx(rounded / (2 * math.pi), rel=1e-12)
    # both formulas, at the angle where one takes over from the other
    for angle in (0.999, 1.001, 2.0, 3.0):
        direct = (math.sin(angle) - angle * math.cos(angle)) / (2 * math.pi)
        assert dual_activation(-math.cos(angle)) == pytest.approx(direct, rel=1e-14)
    np.testing.assert_array_equal(dual_activation([-1.1, 1.1]), [0.0, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_automatic_derivatives_are_the_closed_ones(kind, float64):
    for mode in (jax.grad, jax.jacfwd):
        got = jax.vmap(mode(lambda rho: transition(rho, kind)))(ENDS)
        np.testing.assert_allclose(got, transition_derivative(ENDS, kind), rtol=1e-12)
    step = 1e-6
    inner = np.linspace(-0.9, 0.9, 7)
    differences = (transition(inner + step, kind) - transition(inner - step, kind)) / (2 * step)
    np.testing.assert_allclose(transition_derivative(inner, kind), differences, rtol=1e-8)
    for function in (nngp, ntk):
        derivative = jax.vmap(jax.grad(lambda rho, f=function: f(rho, 5, kind)))(ENDS)
        assert np.all(np.isfinite(derivative))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_enough_without_nan(kind):
    for function in (transition, transition_derivative):
        values = function(np.float32(ENDS), kind)
        assert values.dtype == jnp.float32 and np.all(np.isfinite(values))
        assert np.all(np.isfinite(jax.vmap(jax.grad(lambda r, f=function: f(r, kind)))(ENDS)))
    assert nngp(1, 3, kind).dtype == jnp.float32


def test_what_decides_the_phase(float64):
    assert chi1("weight_mean") == pytest.approx(CHI, abs=1e-12)
    assert chi1("batch_norm") == pytest.approx(CHI, abs=1e-12)
    assert chi1("straight") == 1.0
    for kind in KINDS:
        assert transition(1.0, kind) == pytest.approx(1.0, abs=1e-15)
        assert transition_derivative(1.0, kind) == pytest.approx(chi1(kind), abs=1e-12)
    assert [phase(chi1(kind)) for kind in KINDS] == ["critical", "chaotic", "chaotic"]


@pytest.mark.parametrize("bias_variance", [0.0, 0.1, 0.5])
def test_stable_straight_networks_are_never_chaotic(bias_variance, float64):
    """Proposition 1: sigma_w^2 / 2 + sigma_b^2 = 1 leaves chi_1 = sigma_w^2 / 2."""
    options = {"bias_variance": bias_variance}
    assert transition(1.0, "straight", **options) == pytest.approx(1.0, abs=1e-15)
    found = chi1("straight", **options)
    assert found == pytest.approx(1 - bias_variance, abs=1e-12)
    assert phase(found) == ("ordered" if bias_variance else "critical")
    given = chi1("straight", weight_variance=2 * (1 - bias_variance), **options)
    assert given == pytest.approx(found, abs=1e-12)


def test_fixed_points(float64):
    (only,) = fixed_points("straight")
    assert only.rho == 1.0 and only.stable
    for kind in ("weight_mean", "batch_norm"):
        zero, one = fixed_points(kind)
        assert zero.rho == pytest.approx(0.0, abs=1e-12) and zero.stable
        assert one.rho == 1.0 and not one.stable
        assert one.derivative == pytest.approx(CHI, abs=1e-12)
        # as what is iterated shows
        assert nngp(1 - 1e-9, 200, kind) == pytest.approx(0.0, abs=1e-12)
    assert 1 - nngp(-0.5, 2000, "straight") < 1e-4
    # a bias moves the lower one up
    low, one = fixed_points("weight_mean", bias_variance=0.2)
    assert low.stable and low.rho > 0.2 and not one.stable
    iterated = nngp(0.5, 500, "weight_mean", bias_variance=0.2)
    assert low.rho == pytest.approx(float(iterated), abs=1e-9)
    for at, options in ((zero, {}), (low, {"bias_variance": 0.2})):  # the slope there, and not at 1
        around = nngp(at.rho + np.array([-1e-5, 1e-5]), 1, "weight_mean", **options)
        assert at.derivative == pytest.approx(float(np.diff(around)[0]) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
def test_fixed_points_that_are_about_to_meet(distance):
    """Without float64 too; chi_1 is 1 where the bias's variance is 1/pi."""
    low, one = fixed_points("weight_mean", bias_variance=1 / math.pi - distance)
    assert low.stable and low.derivative < 1.0 < one.derivative and not one.stable
    # near 1, of the angle t: 2 t / (3 pi) = 1 - 1/chi_1
    angle = 1.5 * math.pi * (1 - 1 / one.derivative)
    assert 1 - low.rho == pytest.approx(angle**2 / 2, rel=max(distance, 1e-2))
    assert len(fixed_points("weight_mean", bias_variance=1 / math.pi)) == 1
    assert len(fixed_points("weight_mean", bias_variance=1 / math.pi + distance)) == 1


# variances that vanish, come to rest, grow like the depth, and grow like powers
UNSTABLE = [
    ("straight", {"weight_variance": 1.0}),
    ("straight", {"weight_variance": 1.0, "bias_variance": 0.3}),
    ("straight", {"weight_variance": 2.0, "bias_variance": 0.3}),
    ("straight", {"weight_variance": 3.0, "bias_variance": 0.3}),
    ("weight_mean", {"weight_variance": 2.0, "bias_variance": 0.3}),
    ("weight_mean", {"weight_variance": 4.0, "width": 3}),
]


@pytest.mark.parametrize(("kind", "options"), UNSTABLE)
def test_variances_that_change_are_carried_along(kind, options, float64):
    """Against the recursion of covariances, in numpy and with eq. 4 as printed."""
    rho = np.array([-0.9, -0.2, 0.0, 0.4, 0.95, 1.0])
    weights, bias = options["weight_variance"], options.get("bias_variance", 0.0)
    if "width" in options:
        weights *= 1 - 1 / options["width"]
    variance, nngps, ntks = 1.0, rho, rho
    for _ in range(7):
        c = nngps / variance
        dual = (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / (2 * np.pi)
        lost = 1 / (2 * np.pi) if kind == "weight_mean" else 0.0
        slope = weights * (np.pi - np.arccos(c)) / (2 * np.pi)
        nngps = weights * variance * (dual - lost) + bias
        ntks = nngps + slope * ntks
        variance = weights * variance * (0.5 - lost) + bias
    np.testing.assert_allclose(nngp(rho, 7, kind, **options), nngps, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ntk(rho, 7, kind, **options), ntks, rtol=1e-9, atol=1e-12)
    # deep networks come to where fixed_points says, and the phase is that of their NTK
    c = nngp(0.5, 900, kind, **options) / nngp(1.0, 900, kind, **options)
    (point,) = [point for point in fixed_points(kind, **options) if point.stable]
    assert c == pytest.approx(point.rho, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "expected", "at_least", "at_most"),
    [
        ({"weight_variance": 1.0}, "critical", 7 / 3, 2.5),  # 1 + B/3 as with the stable one
        ({"weight_variance": 3.0, "bias_variance": 0.3}, "critical", 7 / 3, 2.5),
        ({"weight_variance": 1.0, "bias_variance": 0.3}, "ordered", 1e6, math.inf),
        ({"kind": "weight_mean", "weight_variance": 9.0}, "chaotic", 1.0, 1.001),
        ({"kind": "weight_mean", "weight_variance": 0.1}, "chaotic", 1.0, 1.001),
    ],
)
def test_phases_are_of_condition_numbers(options, expected, at_least, at_most, float64):
    """Theorem 1, where variances change too: conditioning does not know how large outputs are."""
    options = {"kind": "straight"} | options
    assert phase(chi1(**options)) == expected
    kernel = jnp.full((4, 4), 0.5) + 0.5 * jnp.eye(4)
    assert at_least <= condition_number(ntk(kernel, 200, **options)) <= at_most


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_of_a_data_set_stays_in_deep_networks(kind):
    """Rounded to just below 1 it would be what a chaotic network tells apart."""
    vectors = np.random.default_rng(0).normal(size=(64, 784)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kernel = jnp.asarray(vectors @ vectors.T)
    assert jnp.diagonal(kernel).min() < 1
    np.testing.assert_allclose(jnp.diagonal(nngp(kernel, 60, kind)), 1.0)
    exact = sum(chi1(kind) ** r for r in range(61))
    np.testing.assert_allclose(jnp.diagonal(ntk(kernel, 60, kind)), exact, rtol=1e-4)


def _against_differences(function, x):
    direction = np.random.default_rng(1).normal(size=x.shape)
    got = jnp.vdot(jax.grad(function)(x), direction)
    step = 1e-6 * direction
    difference = function(x + step) - function(x - step)
    assert got == pytest.approx(float(difference) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("function", [nngp, ntk])
def test_gradients_reach_the_inputs_of_a_data_set(function, float64):
    def total(vectors):
        unit = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
        return jnp.sum(function(unit @ unit.T, 2, "weight_mean"))  # the diagonal as well

    _against_differences(total, jnp.asarray(np.random.default_rng(0).normal(size=(5, 7))))


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_reach_images_with_empty_borders(which, float64):
    images = np.zeros((2, 5, 5, 1))
    images[:, 1:4, 1:4] = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    inner = jnp.asarray(images[:, 1:4, 1:4])

    def cross(inner):
        images = jnp.pad(inner, [(0, 0), (1, 1), (1, 1), (0, 0)])
        return conv_kernels(images, 1, "straight", kernel_size=1)[which][0, 1]

    _against_differences(cross, inner)


@pytest.mark.parametrize("width", [4, 16, 256])
def test_lemma_1_by_sampling(width, float64):
    """E of W-bar: (n - 1)/n of what is left without the value at 0, n the number of inputs."""
    random, draws, rho = np.random.default_rng(width), 200_000 // width, 0.6
    outputs = 8
    u = random.normal(size=(draws, width))
    v = rho * u + math.sqrt(1 - rho**2) * random.normal(size=(draws, width))
    weights = random.normal(size=(draws, outputs, width))
    weights -= weights.mean(-1, keepdims=True)
    hidden = [np.einsum("doi,di->do", weights, np.maximum(x, 0)) for x in (u, v)]
    samples = np.mean(hidden[0] * hidden[1], axis=1) / width
    expected = transition(rho, "weight_mean", width=width, weight_variance=1.0)
    error = samples.std(ddof=1) / math.sqrt(draws)
    assert abs(samples.mean() - expected) < 4 * error
    # n outputs instead, as one print of the lemma has it, or no factor, would be seen at n = 4
    wrong = (outputs - 1) / outputs * width / (width - 1)
    if width == 4:
        assert abs(samples.mean() - wrong * expected) > 6 * error
        assert abs(samples.mean() - transition(rho, "weight_mean", weight_variance=1.0)) > 6 * error
    # the paper's variance makes up for it
    stable = stable_weight_variance("weight_mean", width)
    assert stable == pytest.approx(2 * width / ((width - 1) * (1 - 1 / math.pi)), rel=1e-14)
    kept = transition(1.0, "weight_mean", width=width, weight_variance=stable)
    assert kept == pytest.approx(1.0, abs=1e-14)


def test_the_ntk_of_equal_inputs_is_a_geometric_sum(float64):
    for kind in KINDS:
        expected = sum(chi1(kind) ** r for r in range(6))
        assert ntk(1.0, 5, kind) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(ntk([0.3, 1.0], 0, "straight"), [0.3, 1.0])


def test_condition_numbers():
    assert condition_number(jnp.diag(jnp.array([2.0, 8.0]))) == pytest.approx(4.0)
    assert condition_number(jnp.ones((2, 2))) > 1e6
    stacked = condition_number(jnp.stack([jnp.eye(3), -jnp.eye(3)]))
    assert stacked.tolist() == [1.0, math.inf]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: transition(0.0, "weightmean"),
            "unknown kind of network 'weightmean'",
        ),
        (lambda: transition(0.0, "weight_mean", width=1), "a width of at least 2: 1"),
        (lambda: transition(0.0, "batch_norm", width=4), "batch_norm has no width"),
        (lambda: chi1("straight", bias_variance=-0.1), "bias_variance = -0.1 is not a variance"),
        (lambda: chi1("straight", weight_variance=math.nan), "weight_variance = nan"),
        (lambda: nngp(0.0, -1, "straight"), "depth = -1 is not a number of transitions"),
        (lambda: ntk(0.0, 2.5, "straight"), "depth = 2.5 is not a number of transitions"),
        (lambda: nngp(0.5, 3, "straight", weight_variance=0.0), "every output is 0"),
        (lambda: fixed_points("weight_mean", weight_variance=0.0), "every output is 0"),
        (lambda: chi1("weight_mean", bias_variance=1.5), "leaves no stable weight_variance"),
        (lambda: phase(math.nan), "chi1 = nan is no derivative"),
        (lambda: conv_kernels(jnp.zeros((1, 4, 4, 1)), 1, "batch_norm"), "unknown kind of conv"),
        (lambda: conv_kernels(jnp.zeros((1, 4, 4, 1)), 1, "straight", kernel_size=2), "odd"),
        (lambda: conv_kernels(jnp.zeros((4, 4)), 1, "straight"), r"\(B, H, W, C\), got shape"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
