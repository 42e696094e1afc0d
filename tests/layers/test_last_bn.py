import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.layers import LastBN, cross_entropy, last_bn_cross_entropy
from mimicnorm_jax.parallel import make_mesh

BATCH, CLASSES = 16, 5


@pytest.fixture
def logits(float64):
    return 3.0 * jax.random.normal(jax.random.key(0), (BATCH, CLASSES), jnp.float64) + 7.0


@pytest.fixture
def labels():
    return jnp.arange(BATCH) % CLASSES


def apply(logits, axis_name=None):
    """Output and new running statistics of a fresh LastBN."""
    norm = LastBN(CLASSES, axis_name=axis_name, param_dtype=logits.dtype)
    return norm(logits), norm.mean[...], norm.var[...]


def test_training_normalizes_by_the_biased_and_keeps_the_unbiased_variance(logits):
    y, mean, var = apply(logits)
    x = np.asarray(logits)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(mean, 0.1 * x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-12)


def test_the_gradient_is_that_of_batch_normalization(logits):
    """Ioffe and Szegedy 2015, Section 3: mean and variance depend on the input too."""
    g = np.asarray(jax.random.normal(jax.random.key(1), logits.shape, jnp.float64))
    gradient = jax.grad(lambda x: jnp.sum(g * apply(x)[0]))(logits)
    x = np.asarray(logits)
    deviation = np.sqrt(x.var(0) + 1e-5)
    y = (x - x.mean(0)) / deviation
    expected = (g - g.mean(0) - y * (g * y).mean(0)) / deviation
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)


def test_evaluation_uses_the_running_statistics_and_leaves_them(logits):
    norm = LastBN(CLASSES, param_dtype=jnp.float64)
    norm(logits)
    norm.eval()
    mean, var = norm.mean[...], norm.var[...]
    np.testing.assert_allclose(
        norm(logits[:1]), (logits[:1] - mean[None]) / np.sqrt(var[None] + 1e-5)
    )
    np.testing.assert_array_equal(norm.mean[...], mean)


def test_a_large_mean_does_not_cancel_the_variance():
    x = 1e4 + jax.random.normal(jax.random.key(0), (256, CLASSES))
    assert jnp.std(apply(x)[0]) == pytest.approx(1.0, abs=1e-2)


def test_bfloat16_logits_are_normalized_in_float32():
    y, _, _ = apply(jnp.ones((4, CLASSES), jnp.bfloat16).at[0].set(2.0))
    assert y.dtype == jnp.float32
    norm = LastBN(CLASSES)
    norm(jnp.ones((4, CLASSES), jnp.bfloat16))
    assert norm.mean[...].dtype == jnp.float32


def test_a_single_example_cannot_be_normalized():
    with pytest.raises(ValueError, match="at least 2 examples"):
        apply(jnp.ones((1, CLASSES)))


def shard_mapped(f):
    def run(x):
        return jax.shard_map(
            lambda x: f(x, "data"),
            mesh=make_mesh(4),
            in_specs=P("data"),
            out_specs=(P("data"), P(), P()),
        )(x)

    return run


def pmapped(f):
    def run(x):
        y, mean, var = jax.pmap(lambda x: f(x, "data"), axis_name="data")(x.reshape(4, -1, CLASSES))
        return y.reshape(BATCH, CLASSES), mean[0], var[0]

    return run


def vmapped(f):
    def run(x):
        y, mean, var = jax.vmap(lambda x: f(x, "data"), axis_name="data")(x.reshape(4, -1, CLASSES))
        return y.reshape(BATCH, CLASSES), mean[0], var[0]

    return run


@pytest.mark.filterwarnings("ignore:.*pmap.*")
@pytest.mark.parametrize("mapped", [shard_mapped, pmapped, vmapped])
def test_a_batch_in_four_parts_equals_the_whole_batch(mapped, logits):
    weights = jax.random.normal(jax.random.key(1), logits.shape, jnp.float64)
    in_parts = mapped(apply)
    for got, expected in zip(in_parts(logits), apply(logits), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(weights * jnp.sin(in_parts(x)[0])))(logits)
    expected = jax.grad(lambda x: jnp.sum(weights * jnp.sin(apply(x)[0])))(logits)
    assert jnp.max(jnp.abs(expected)) > 0.01
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_folded_loss_equals_last_bn_then_cross_entropy(logits, labels, smoothing):
    def folded(x):
        losses, mean, var = last_bn_cross_entropy(x, labels, label_smoothing=smoothing)
        return losses.mean(), (losses, mean, var)

    def in_turn(x):
        losses = cross_entropy(apply(x)[0], labels, smoothing)
        return losses.mean(), losses

    (_, (losses, mean, var)), gradient = jax.value_and_grad(folded, has_aux=True)(logits)
    (_, expected), expected_gradient = jax.value_and_grad(in_turn, has_aux=True)(logits)
    assert losses.shape == (BATCH,)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(mean, np.mean(logits, 0), rtol=1e-12)
    np.testing.assert_allclose(var, np.var(logits, 0), rtol=1e-12)


def test_the_folded_loss_of_a_batch_in_four_parts_equals_the_whole(logits, labels):
    losses, mean, var = jax.shard_map(
        lambda x, y: last_bn_cross_entropy(x, y, "data"),
        mesh=make_mesh(4),
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P(), P()),
    )(logits, labels)
    for got, expected in zip(
        (losses, mean, var), last_bn_cross_entropy(logits, labels), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_label_smoothing_spreads_its_weight_uniformly(logits, labels):
    target = 0.9 * jax.nn.one_hot(labels, CLASSES) + 0.1 / CLASSES
    expected = optax.softmax_cross_entropy(logits, target)
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.1), expected, rtol=1e-6)


def test_eval_and_train_mode_reach_the_layer():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = LastBN(CLASSES)

    model = Model()
    model.eval()
    assert model.norm.use_running_average
    model.train()
    assert not model.norm.use_running_average
