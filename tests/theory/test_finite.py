"""Infinite width against real modules, by Monte Carlo.

The short tests are for every day; ``pytest -m long tests/theory/test_finite.py`` holds width
1024 to 2 % (5 % at depth 20), with the number of initializations that this takes.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models import create_model
from mimicnorm_jax.theory.batches import batch_kernels, batch_norm_kernel, centered
from mimicnorm_jax.theory.finite import empirical_kernels, logits, mlp, pre_activations
from mimicnorm_jax.theory.kernels import nngp, ntk, transition, transition_derivative

SIZE = 8
# Two orthogonal directions without a mean, and inputs at these angles between them: a chaotic
# network of 20 layers still sees the small ones.
ANGLES = np.array([0.0, 0.002, 0.01, 0.05, 0.2, 0.6, 1.2, 2.0])


@pytest.fixture(scope="module")
def inputs():
    """Images of which the first layer's pre-activations have variance 1, and their kernel."""
    features = SIZE * SIZE
    random = np.random.default_rng(0).normal(size=(features, 2))
    plane, _ = np.linalg.qr(random - random.mean(0))
    vectors = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1) @ plane.T
    return vectors.reshape(-1, SIZE, SIZE, 1), np.cos(ANGLES[:, None] - ANGLES)


def images_for(kind, vectors):
    """Of features without a mean a centred layer takes n/(n - 1) times the mean square."""
    features = SIZE * SIZE
    return jnp.asarray(vectors * np.sqrt(features - (kind == "weight_mean")), jnp.float32)


def digits(count):
    images = load_digits().images[:count, :, :, None]
    return jnp.asarray((images - images.mean()) / images.std(), jnp.float32)


def errors(found, expected):
    """Relative errors of the diagonal and of the rest."""
    expected = np.asarray(expected)
    off = ~np.eye(len(expected), dtype=bool)
    return [
        np.linalg.norm((found - expected)[part]) / np.linalg.norm(expected[part])
        for part in (~off, off)
    ]


def as_printed(rho0, depth, kind):
    """The paper's eq. 7, whose product runs over r = l + 1 to L instead of l to L - 1."""
    kernels = [np.asarray(nngp(rho0, layer, kind)) for layer in range(depth + 1)]
    total = 0
    for layer, kernel in enumerate(kernels):
        for later in kernels[layer + 1 :]:
            kernel = kernel * np.asarray(transition_derivative(later, kind))
        total = total + kernel
    return total


@pytest.mark.parametrize("kind", ["straight", "weight_mean"])
def test_wide_networks_have_the_kernels_of_the_theory(kind, inputs):
    vectors, rho0 = inputs
    found = empirical_kernels(
        mlp(kind, 2, 256, SIZE),
        images_for(kind, vectors),
        outputs=pre_activations(2),
        count=150,
        directions=2,
    )
    assert max(errors(found.nngp.mean, nngp(rho0, 2, kind))) < 0.05
    assert max(errors(found.ntk.mean, ntk(rho0, 2, kind))) < 0.05
    # the estimate knows how good it is
    deviation = (found.nngp.mean - np.asarray(nngp(rho0, 2, kind))) / found.nngp.error
    assert np.abs(deviation).max() < 4


def test_batch_norm_networks_have_the_kernels_of_their_batch():
    images = digits(12)
    vectors = np.asarray(images).reshape(len(images), -1)
    gram = jnp.asarray(vectors @ vectors.T / vectors.shape[1])
    found = empirical_kernels(
        mlp("batch_norm", 1, 256, SIZE),
        images,
        outputs=pre_activations(1),
        count=300,
        directions=1,
    )
    exact = batch_kernels(gram, 1, samples=8192)
    diagonal, rest = errors(found.nngp.mean, exact.nngp)
    assert diagonal < 0.01 and rest < 0.06
    diagonal, rest = errors(found.ntk.mean, exact.ntk)
    assert diagonal < 0.03 and rest < 0.06
    # the mean variance of all channels for that of each, and infinitely many inputs, are not it
    start = centered(gram)
    simple = batch_norm_kernel(start / jnp.mean(jnp.diagonal(start)))
    assert errors(found.nngp.mean, simple)[1] > 0.15
    power = jnp.sqrt(jnp.diagonal(start))
    limit = transition(start / power[:, None] / power[None], "batch_norm")
    assert errors(found.nngp.mean, limit)[1] > 0.2


def test_the_kernel_of_a_batch_is_an_expectation_over_channels():
    gram = np.cov(np.random.default_rng(0).normal(size=(6, 9)))
    exact = batch_kernels(jnp.asarray(gram), 1, samples=0).nngp
    random = np.random.default_rng(1)

    def normalized(covariance):
        h = random.multivariate_normal(np.zeros(6), covariance, size=200_000)
        h -= h.mean(1, keepdims=True)
        return h / np.sqrt(np.mean(h**2, axis=1, keepdims=True))

    rectified = np.maximum(normalized(gram), 0)
    y = normalized(rectified.T @ rectified / len(rectified))
    np.testing.assert_allclose(exact, y.T @ y / len(y), atol=0.012)
    assert np.trace(exact) == pytest.approx(6, rel=1e-4)
    np.testing.assert_allclose(np.sum(exact, axis=0), 0, atol=1e-4)


def test_the_last_bn_couples_the_outputs_of_a_batch():
    """Its outputs have no mean over the batch, and no step can give them one."""
    found = empirical_kernels(
        lambda rngs: create_model(
            "mlp", method="mimicnorm", num_classes=6, image_size=SIZE, channels=1, rngs=rngs
        ),
        digits(5),
        outputs=logits,
        count=3,
        directions=3,
    )
    for kernel in (found.nngp.mean, found.ntk.mean):
        assert np.abs(kernel.sum(axis=0)).max() < 1e-3 * np.trace(kernel)
    assert np.trace(found.nngp.mean) == pytest.approx(5, rel=1e-3)


def test_what_is_wrong_is_said():
    with pytest.raises(UserError, match="count = 1; a standard error needs at least 2"):
        empirical_kernels(mlp("straight", 1, 8, SIZE), digits(3), count=1)
    with pytest.raises(UserError, match="unknown kind of network 'fixup'"):
        mlp("fixup", 1, 8, SIZE)
    with pytest.raises(UserError, match="the batch, of 2, at least 3"):
        batch_kernels(jnp.eye(2), 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("depth", "count", "directions"), [(1, 400, 4), (5, 400, 4), (20, 1500, 0)]
)
@pytest.mark.parametrize("kind", ["straight", "weight_mean"])
def test_width_1024(kind, depth, count, directions, inputs):
    vectors, rho0 = inputs
    found = empirical_kernels(
        mlp(kind, depth, 1024, SIZE),
        images_for(kind, vectors),
        outputs=pre_activations(depth),
        count=count,
        directions=directions,
        quiet=False,
    )
    measured = {"nngp": errors(found.nngp.mean, nngp(rho0, depth, kind))}
    if directions:
        measured["ntk"] = errors(found.ntk.mean, ntk(rho0, depth, kind))
        printed = errors(found.ntk.mean, as_printed(rho0, depth, kind))
        print(f"{kind}, depth {depth}: eq. 7 as printed {printed}")
        assert printed[1] > 0.02
    print(f"{kind}, depth {depth}, {count} initializations: {measured}")
    assert max(max(pair) for pair in measured.values()) < (0.05 if depth == 20 else 0.02)


@pytest.mark.long
@pytest.mark.parametrize(("depth", "count"), [(1, 1000), (5, 1500)])
def test_width_1024_with_batch_norm(depth, count):
    images = digits(16)
    vectors = np.asarray(images).reshape(len(images), -1)
    gram = jnp.asarray(vectors @ vectors.T / vectors.shape[1])
    found = empirical_kernels(
        mlp("batch_norm", depth, 1024, SIZE),
        images,
        outputs=pre_activations(depth),
        count=count,
        directions=1,
        quiet=False,
    )
    exact = batch_kernels(gram, depth, samples=2**17)
    measured = errors(found.nngp.mean, exact.nngp), errors(found.ntk.mean, exact.ntk)
    print(f"batch_norm, depth {depth}, {count} initializations: {measured}")
    assert max(max(pair) for pair in measured) < 0.02
