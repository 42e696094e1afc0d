import numpy as np
import pytest

from mimicnorm_jax.theory import marginal as marginals


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).standard_normal((1_000_000, 4))


def moments(marginal):
    values = np.asarray(marginal)
    return [float(marginals.expectation(values**power)) for power in (1, 2)]


def of_sample(values):
    return [values.mean(), (values**2).mean()]


def test_the_table_of_relu_is_the_arc_cosine_kernel():
    """Eq. 4 of the paper: 2 phi(rho) with phi(rho) = E[max(u, 0) max(v, 0)]."""
    rho = marginals.CORRELATIONS
    kernel = (np.sqrt(1 - rho**2) + rho * (np.pi - np.arccos(rho))) / np.pi
    rectified = np.maximum(np.asarray(marginals.gaussian()), 0)
    np.testing.assert_allclose(marginals.correlation_table(rectified), kernel, atol=0.005)


def test_the_table_of_a_gaussian_is_the_correlation_itself():
    table = marginals.correlation_table(marginals.gaussian())
    np.testing.assert_allclose(table, marginals.CORRELATIONS, atol=1e-5)


def test_tables_are_inverted():
    table = marginals.correlation_table(np.maximum(np.asarray(marginals.gaussian()), 0))
    rho = np.linspace(-0.9, 1, 20, dtype=np.float32)
    back = marginals.copula_correlation(marginals.cosine_of(rho, table), table)
    np.testing.assert_allclose(back, rho, atol=1e-4)


def test_a_sum_has_the_moments_of_independent_summands(normal):
    gaussian = marginals.gaussian()
    total = marginals.sum_of(np.maximum(np.asarray(gaussian), 0), gaussian)
    expected = of_sample(np.maximum(normal[:, 0], 0) + normal[:, 1])
    assert moments(total) == pytest.approx(expected, rel=0.01, abs=0.005)
    rectified = np.maximum(np.asarray(total), 0)
    expected = of_sample(np.maximum(np.maximum(normal[:, 0], 0) + normal[:, 1], 0))
    assert moments(rectified) == pytest.approx(expected, rel=0.01)


def test_a_mixture_has_the_moments_of_its_parts_in_proportion():
    gaussian = marginals.gaussian()
    mixed = marginals.mixture_of(gaussian * 0, gaussian * 2 + 1, 0.75)
    assert moments(mixed) == pytest.approx([0.25, 0.25 * 5], rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
def test_the_maximum_of_equally_correlated_values(normal, rho):
    common = np.random.default_rng(1).standard_normal((len(normal), 1))
    values = np.maximum(np.sqrt(rho) * common + np.sqrt(1 - rho) * normal, 0)
    rectified = np.maximum(np.asarray(marginals.gaussian()), 0)
    maximum = marginals.maximum_of(rectified, 4, np.float32(rho))
    assert moments(maximum) == pytest.approx(of_sample(values.max(axis=1)), rel=0.01)


def test_the_spread_of_a_maximum(normal):
    assert marginals.maximum_variance(4) == pytest.approx(normal.max(axis=1).var(), rel=0.01)
    assert marginals.maximum_variance(1) == pytest.approx(1.0, rel=1e-3)


def test_nothing_stays_nothing():
    np.testing.assert_array_equal(marginals.normalize(marginals.gaussian() * 0), 0)
