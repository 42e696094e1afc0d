"""The theory's claims at initialization, on the real layers (Sections 3 and 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.methods import Site, create_method

DEPTH, WIDTH, BATCH = 50, 1024, 256


def pre_activations(method, x):
    """Yields the pre-activations of ``DEPTH`` hidden layers after rectified inputs."""
    for layer in range(DEPTH):
        dense = method.dense(WIDTH, WIDTH, site=Site("inner"), rngs=nnx.Rngs(layer))
        x = dense(nnx.relu(x))
        yield x


def mean_correlation(x):
    """Mean over pairs of different examples of the cosine of their pre-activations."""
    unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    return (jnp.sum(unit @ unit.T) - len(x)) / (len(x) * (len(x) - 1))


@pytest.fixture(scope="module")
def independent():
    return jax.random.normal(jax.random.key(0), (BATCH, WIDTH))


@pytest.fixture(scope="module")
def correlated(independent):
    """Inputs of second moment 1 and pairwise correlation 1/2."""
    common = jax.random.normal(jax.random.key(1), (1, WIDTH))
    return jnp.sqrt(0.5) * (independent + common)


@pytest.mark.parametrize("weight_mean", ["reparameterized", "projected"])
def test_weight_mean_keeps_the_second_moment_within_5_percent_through_50_layers(
    independent, weight_mean
):
    method = create_method("mimicnorm", weight_mean=weight_mean)
    moments = [float(jnp.mean(x**2)) for x in pre_activations(method, independent)]
    assert len(moments) == DEPTH
    np.testing.assert_allclose(moments, 1.0, atol=0.05)


def test_weight_mean_decorrelates_and_its_absence_correlates(correlated):
    assert mean_correlation(correlated) == pytest.approx(0.5, abs=0.05)
    centred = [mean_correlation(x) for x in pre_activations(create_method("mimicnorm"), correlated)]
    plain = [mean_correlation(x) for x in pre_activations(create_method("lastbn"), correlated)]
    # K -> (phi(K) - phi(0)) / (phi(1) - phi(0)) has the stable fixed point 0, with slope
    # 1/(2 (1 - 1/pi)) = 0.73 there; the straight network's K -> 2 phi(K) has it at 1.
    assert abs(centred[-1]) < 0.02
    assert plain[-1] > 0.98
    assert abs(centred[1]) < abs(centred[0]) < 0.5 < plain[0] < plain[1]
