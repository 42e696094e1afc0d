"""Any activation by quadrature, against closed forms and sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import stable_variance
from mimicnorm_jax.layers.activation import activation_moments, stable_variance_of
from mimicnorm_jax.theory import chi1_of, dual_activation, dual_activation_of


def test_relu_is_what_the_paper_has():
    moments = activation_moments(jax.nn.relu)
    assert moments.mean == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-6)
    assert moments.variance == pytest.approx((1 - 1 / math.pi) / 2, rel=1e-6)
    for centered in (True, False):
        expected = stable_variance(27, centered=centered, after_relu=True)
        assert stable_variance_of(moments, 27, centered=centered) == pytest.approx(expected)
    assert chi1_of(jax.nn.relu, centered=True) == pytest.approx(1 / (1 - 1 / math.pi), rel=1e-6)
    assert chi1_of(jax.nn.relu, centered=False) == pytest.approx(1, rel=1e-6)
    rho = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(
        dual_activation_of(jax.nn.relu, rho), dual_activation(rho), atol=1e-5
    )


@pytest.mark.parametrize(
    "phi", [jax.nn.gelu, jax.nn.silu, jax.nn.relu6, jax.nn.hard_swish, jnp.tanh, jax.nn.sigmoid]
)
def test_the_moments_are_those_of_samples(phi):
    z = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    y, slope = jax.jvp(phi, (jnp.asarray(z),), (jnp.ones_like(z),))
    moments = activation_moments(phi)
    sampled = (np.mean(y), np.mean(np.square(y)), np.mean(np.square(slope)))
    np.testing.assert_allclose(moments, sampled, atol=4e-3)


def test_what_has_no_variance_is_refused():
    with pytest.raises(ValueError, match="nothing comes through"):
        stable_variance_of(activation_moments(jnp.ones_like), 27, centered=True)
    with pytest.raises(ValueError, match="fan_in must be at least 2, got 1"):
        stable_variance_of(activation_moments(jax.nn.relu), 1, centered=True)
    with pytest.raises(ValueError, match="not finite"):
        activation_moments(lambda z: 1 / jnp.maximum(z, 0))
