"""Last BN and its loss, called as Flax's BatchNorm is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.layers import LastBN, cross_entropy, last_bn_cross_entropy
from mimicnorm_jax.parallel import make_mesh

CLASSES = 5


def normal(*shape):
    return 3.0 * jax.random.normal(jax.random.key(0), shape, jnp.float64) + 7.0


def layer(**options):
    return LastBN(CLASSES, param_dtype=jnp.float64, **options)


class Model(nnx.Module):
    def __init__(self):
        self.last = LastBN(CLASSES)

    def __call__(self, x):
        return self.last(x)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_a_view_evaluates_and_leaves_the_layer_in_training():
    model = Model()
    seen = nnx.view(model, use_running_average=True)
    x = jnp.arange(10.0).reshape(2, 5)
    np.testing.assert_allclose(seen(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert not model.last.use_running_average
    assert jnp.abs(model(x)).max() < 1.01


@pytest.mark.parametrize("own", [True, False])
def test_the_call_overrides_the_layers_mode(own, float64):
    x = normal(4, CLASSES)
    norm = layer(use_running_average=own)
    np.testing.assert_allclose(norm(x, use_running_average=True), x / np.sqrt(1 + 1e-5))
    np.testing.assert_array_equal(norm.mean[...], 0.0)
    np.testing.assert_allclose(norm(x, False).mean(0), 0.0, atol=1e-12)
    assert (norm.mean[...] != 0).all()
    assert norm.use_running_average is own


def test_segmentation_is_normalized_over_all_but_the_classes(float64):
    x = normal(3, 4, 6, CLASSES)
    labels = jnp.arange(72).reshape(3, 4, 6) % CLASSES
    flat = x.reshape(-1, CLASSES)
    norm, of_flat = layer(), layer()
    np.testing.assert_allclose(norm(x).reshape(-1, CLASSES), of_flat(flat), rtol=1e-12)
    np.testing.assert_allclose(norm.var[...], of_flat.var[...], rtol=1e-12)
    losses, mean, var = last_bn_cross_entropy(x, labels)
    expected, *statistics = last_bn_cross_entropy(flat, labels.reshape(-1))
    assert losses.shape == (3, 4, 6)
    np.testing.assert_allclose(losses.reshape(-1), expected, rtol=1e-12)
    np.testing.assert_allclose((mean, var), statistics, rtol=1e-12)


@pytest.mark.parametrize("form", [lambda m: m, lambda m: m[:, None, None], lambda m: m[..., None]])
def test_what_is_masked_does_not_count(form, float64):
    x = normal(6, CLASSES)
    x = x.at[4:].set(1e6)
    mask = jnp.arange(6) < 4
    norm, of_four = layer(), layer()
    shape = (6, CLASSES) if form(mask).ndim < 3 else (6, 1, CLASSES)
    y = norm(x.reshape(shape), mask=form(mask)).reshape(6, CLASSES)
    np.testing.assert_allclose(y[:4], of_four(x[:4]), rtol=1e-12)
    np.testing.assert_allclose(norm.mean[...], of_four.mean[...], rtol=1e-12)
    np.testing.assert_allclose(norm.var[...], of_four.var[...], rtol=1e-12)


def test_the_gradient_does_not_see_what_is_masked(float64):
    x, labels, mask = normal(6, CLASSES), jnp.arange(6) % CLASSES, jnp.arange(6) < 4

    def loss(x, **options):
        losses = last_bn_cross_entropy(x, labels[: len(x)], label_smoothing=0.1, **options)[0]
        return losses.sum() / 4

    gradient = jax.grad(loss)(x.at[4:].set(jnp.inf), mask=mask)
    np.testing.assert_array_equal(gradient[4:], 0.0)
    np.testing.assert_allclose(gradient[:4], jax.grad(loss)(x[:4]), rtol=1e-10)
    np.testing.assert_array_equal(last_bn_cross_entropy(x, labels, mask=mask)[0][4:], 0.0)


def test_padding_of_no_number_spoils_no_gradient(float64):
    x, mask = normal(6, CLASSES).at[4:].set(jnp.nan), jnp.arange(6) < 4

    def loss(x, mask):
        return jnp.sum(jnp.where(mask[:, None], jnp.sin(layer()(x, mask=mask)), 0))

    gradient = jax.grad(loss)(x, mask)
    np.testing.assert_array_equal(gradient[4:], 0.0)
    np.testing.assert_allclose(gradient[:4], jax.grad(loss)(x[:4], mask[:4]), rtol=1e-10)


def test_labels_that_are_left_out_may_be_none_of_the_classes():
    x, mask = jnp.arange(20.0).reshape(4, 5) ** 0.5, jnp.arange(4) < 3
    with jax.debug_nans(True):
        losses, *_ = last_bn_cross_entropy(x, jnp.array([0, 1, 2, 255]), mask=mask)
    assert jnp.isfinite(losses).all() and losses[3] == 0


def test_averages_are_kept_in_float32_whatever_the_parameters_are():
    norm = LastBN(CLASSES, momentum=0.99, param_dtype=jnp.bfloat16)
    assert (norm.mean.dtype, norm.var.dtype) == (jnp.float32, jnp.float32)
    x = 100 + 0.1 * jax.random.normal(jax.random.key(0), (64, CLASSES))
    for _ in range(1200):
        norm(x)
    np.testing.assert_allclose(norm.mean[...], x.mean(0), rtol=1e-4)


def test_devices_may_hold_different_numbers_of_examples(float64):
    x, mask = normal(8, CLASSES), jnp.arange(8) < 5
    norm = layer()
    expected = norm(x[:5])

    def run(x, mask):
        part = layer(axis_name="data")
        return part(x, mask=mask), part.mean[...], part.var[...]

    y, mean, var = jax.shard_map(
        run, mesh=make_mesh(4), in_specs=(P("data"), P("data")), out_specs=(P("data"), P(), P())
    )(x, mask)
    np.testing.assert_allclose(y[:5], expected, rtol=1e-12)
    np.testing.assert_allclose(mean, norm.mean[...], rtol=1e-12)
    np.testing.assert_allclose(var, norm.var[...], rtol=1e-12)


def test_statistics_of_fewer_than_two_examples_are_not_kept(float64):
    def run(mask):
        norm = layer()
        return norm(normal(4, CLASSES), mask=mask), norm.mean[...], norm.var[...]

    for kept, compiled in itertools.product((0, 1), (True, False)):
        y, mean, var = (jax.jit(run) if compiled else run)(jnp.arange(4) < kept)
        assert jnp.isfinite(y).all()
        np.testing.assert_array_equal(mean, 0.0)
        np.testing.assert_array_equal(var, 1.0)


def test_single_examples_mapped_over_a_named_axis_are_a_batch(float64):
    x, labels = normal(6, CLASSES), jnp.arange(6) % CLASSES
    mapped = jax.vmap(lambda x: layer(axis_name="batch")(x), axis_name="batch")
    np.testing.assert_allclose(mapped(x), layer()(x), rtol=1e-12)
    losses = jax.vmap(lambda x, y: last_bn_cross_entropy(x, y, "batch")[0], axis_name="batch")
    np.testing.assert_allclose(losses(x, labels), last_bn_cross_entropy(x, labels)[0], rtol=1e-12)


def test_a_single_vector_is_normalized_in_evaluation():
    norm = LastBN(CLASSES, use_running_average=True)
    np.testing.assert_allclose(norm(jnp.ones(CLASSES)), 1.0, rtol=1e-4)


X, LABELS = jnp.ones((4, CLASSES)), jnp.arange(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LastBN(CLASSES)(X[0]), r"normalizes logits \(B, ..., C\) over a batch"),
        (lambda: jax.vmap(lambda x: LastBN(CLASSES)(x))(X), "under jax.vmap call it on the whole"),
        (lambda: LastBN(CLASSES)(X[:, :1]), "expected logits of 5 classes"),
        (lambda: LastBN(1)(X), "expected logits of 1 classes"),
        (lambda: LastBN(CLASSES)(X[:1]), "at least 2 examples"),
        (lambda: LastBN(CLASSES)(X, mask=jnp.ones(5)), r"its shape is \(4,\), got \(5,\)"),
        (lambda: LastBN(CLASSES)(X, mask=jnp.ones((4, 5))), "mask of logits"),
        (lambda: LastBN(CLASSES)(X, True, mask=jnp.ones(5)), "mask of logits"),
        (lambda: last_bn_cross_entropy(X[0], 1), "over a batch"),
        (lambda: last_bn_cross_entropy(X[:1], LABELS[:1]), "at least 2 examples"),
        (lambda: last_bn_cross_entropy(X, LABELS[:, None]), r"each of \(4,\).*shape \(4, 1\)"),
        (lambda: last_bn_cross_entropy(X, X), "a class index for each"),
        (lambda: last_bn_cross_entropy(X, LABELS * 1.0), "labels of type float32"),
        (lambda: last_bn_cross_entropy(X, LABELS, mask=jnp.ones(3)), "mask of logits"),
        (lambda: cross_entropy(X, LABELS[:3]), "a class index for each"),
    ],
)
def test_what_is_refused_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
