"""The theory's claims at initialization, on the real layers (Sections 3 and 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.methods import Site, create_method

DEPTH, WIDTH, BATCH = 50, 1024, 256


def pre_activations(method, x, depth=DEPTH):
    """Those of ``depth`` hidden layers after rectified inputs."""
    found = []
    for layer in range(depth):
        dense = method.dense(WIDTH, WIDTH, site=Site("inner"), rngs=nnx.Rngs(layer))
        x = dense(nnx.relu(x))
        found.append(x)
    return found


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


@pytest.fixture(scope="module")
def centred_layers(independent, correlated):
    """Of both inputs, one below the other, since to draw the weights takes most of the time."""
    return pre_activations(create_method("mimicnorm"), jnp.concatenate([independent, correlated]))


def test_weight_mean_keeps_the_second_moment_within_5_percent_through_50_layers(centred_layers):
    moments = [float(jnp.mean(x[:BATCH] ** 2)) for x in centred_layers]
    assert len(moments) == DEPTH
    np.testing.assert_allclose(moments, 1.0, atol=0.05)


def test_both_forms_of_weight_mean_begin_alike(centred_layers, independent):
    projected = create_method("mimicnorm", weight_mean="projected")
    for x, y in zip(pre_activations(projected, independent, depth=3), centred_layers, strict=False):
        np.testing.assert_allclose(x, y[:BATCH], rtol=1e-4, atol=1e-4)


def test_weight_mean_decorrelates_and_its_absence_correlates(centred_layers, correlated):
    assert mean_correlation(correlated) == pytest.approx(0.5, abs=0.05)
    centred = [mean_correlation(x[BATCH:]) for x in centred_layers]
    plain = [mean_correlation(x) for x in pre_activations(create_method("lastbn"), correlated)]
    # K -> (phi(K) - phi(0)) / (phi(1) - phi(0)) has the stable fixed point 0, with slope
    # 1/(2 (1 - 1/pi)) = 0.73 there; the straight network's K -> 2 phi(K) has it at 1.
    assert abs(centred[-1]) < 0.02
    assert plain[-1] > 0.98
    assert abs(centred[1]) < abs(centred[0]) < 0.5 < plain[0] < plain[1]
