import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm


def both(features, **options):
    """Ours and Flax's, with the same parameters and statistics that are not those of the start."""
    layers = []
    flaxs = nnx.BatchNorm(features, momentum=0.9, rngs=nnx.Rngs(0), **options)
    for layer in (ShiftedBatchNorm(features, rngs=nnx.Rngs(0), **options), flaxs):
        key = jax.random.key(7)
        layer.scale[...] = 1 + 0.3 * jax.random.normal(key, (features,), layer.scale.dtype)
        layer.bias[...] = jax.random.normal(key, (features,), layer.bias.dtype)
        layers.append(layer)
    return layers


def test_outputs_and_gradients_are_flaxs_and_the_running_variance_is_unbiased(float64):
    x = 2 + 3 * jax.random.normal(jax.random.key(0), (4, 5, 6, 3), jnp.float64)
    results = []
    for layer in both(3, param_dtype=jnp.float64):
        # in place of Flax's float32
        layer.mean = nnx.BatchStat(jnp.asarray([0.5, -1.0, 2.0]))
        layer.var = nnx.BatchStat(jnp.asarray([0.5, 1.0, 2.0]))
        graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

        def loss(params, x, graph=graph, stats=stats):
            layer = nnx.merge(graph, params, stats, copy=True)
            y = layer(x)
            return jnp.sum(jnp.sin(y)), (y, layer.mean[...], layer.var[...])

        gradients, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        results.append((*jax.tree.leaves(gradients), *aux))
        layer.eval()
        results[-1] = (*results[-1], layer(x))
    ours, theirs = results
    count = 4 * 5 * 6
    batch = (theirs[-2] - 0.9 * jnp.asarray([0.5, 1.0, 2.0])) / 0.1  # biased
    theirs = (*theirs[:-2], theirs[-2] + 0.1 * batch / (count - 1), theirs[-1])
    assert len(ours) == 3 + 3 + 1
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_variance_does_not_vanish_beside_a_large_mean():
    """E[x^2] - E[x]^2 is 0 here in float32, and the outputs have a deviation of 31."""
    ours, theirs = both(2)
    for layer in (ours, theirs):
        layer.scale[...], layer.bias[...] = jnp.ones(2), jnp.zeros(2)
    batches = (
        1000 + 0.1 * jax.random.normal(jax.random.key(step), (64, 4, 4, 2)) for step in range(150)
    )
    for x in batches:
        y, flaxs = ours(x), theirs(x)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1.0, rtol=0.01)
    np.testing.assert_allclose(ours.var[...], 0.01, rtol=0.05)
    assert flaxs.std() > 5
    ours.eval()
    np.testing.assert_allclose(ours(x).std((0, 1, 2)), 1.0, rtol=0.05)


def test_over_a_mapped_axis_everything_is_that_of_the_whole_batch(float64):
    x = 5 + jax.random.normal(jax.random.key(1), (8, 3, 3, 2), jnp.float64)

    def run(x, axis_name=None):
        layer = ShiftedBatchNorm(2, param_dtype=jnp.float64, axis_name=axis_name, rngs=nnx.Rngs(0))
        graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

        def outputs(params, x):
            layer = nnx.merge(graph, params, stats, copy=True)
            return layer(x), (layer.mean[...], layer.var[...])

        y, backward, statistics = jax.vjp(outputs, params, x, has_aux=True)
        of_params, of_x = backward(jnp.sin(3 * y))
        return (y, of_x), (of_params, statistics)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": P("data"), "out_specs": (P("data"), P())}
    parts = jax.jit(jax.shard_map(lambda x: run(x, "data"), mesh=mesh, **specs))(x)
    found, expected = jax.tree.leaves(parts), jax.tree.leaves(run(x))
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
        assert np.abs(b).max() > 1e-3


def test_what_is_kept_for_the_backward_pass_is_the_input_in_its_own_type():
    layer = ShiftedBatchNorm(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
    x = jnp.ones((8, 5, 5, 4), jnp.bfloat16)

    def outputs(params, x):
        return nnx.merge(graph, params, stats, copy=True)(x)

    _, backward = jax.vjp(outputs, params, x)
    (kept,) = (leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size)
    assert kept.dtype == jnp.bfloat16 and kept.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_the_type_of_the_result_only(training):
    layer = ShiftedBatchNorm(2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = (100 + jax.random.normal(jax.random.key(1), (64, 4, 4, 2))).astype(jnp.bfloat16)
    for _ in range(100):
        layer(x)
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(layer.mean[...], exact.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(layer.var[...], exact.var((0, 1, 2)), rtol=0.01)
    if not training:
        layer.eval()
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    expected = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.03)
