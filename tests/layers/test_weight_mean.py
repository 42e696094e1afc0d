import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.layers import (
    ScaledConv,
    ScaledDense,
    WeightMeanConv,
    WeightMeanDense,
    center_kernel,
    stable_normal,
    stable_variance,
)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("shape", [(3, 3, 16, 8), (64, 10), (5, 4, 2), (1, 1, 4, 4, 6)])
def test_centred_kernel_has_zero_mean_in_every_output_channel(shape):
    centred = center_kernel(normal(0, shape) + 3.0)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(centred.mean(axes), 0.0, atol=1e-5)


def test_centring_changes_nothing_but_the_mean():
    kernel = normal(0, (3, 3, 4, 5))
    difference = np.asarray(kernel - center_kernel(kernel)).reshape(-1, 5)
    np.testing.assert_allclose(
        difference, np.broadcast_to(difference[:1], difference.shape), atol=1e-6
    )
    np.testing.assert_allclose(
        center_kernel(center_kernel(kernel)), center_kernel(kernel), atol=1e-6
    )


def test_a_bfloat16_kernel_is_centred_in_float32():
    kernel = (normal(0, (512, 8)) + 10.0).astype(jnp.bfloat16)
    centred = center_kernel(kernel)
    assert centred.dtype == jnp.bfloat16
    exact = np.asarray(kernel, np.float64)
    exact -= exact.mean(0)
    # the only error left is the rounding of the result, 2^-9 relative
    np.testing.assert_allclose(np.asarray(centred, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_centring_a_vector_is_an_error():
    with pytest.raises(ValueError, match="at least 2 axes"):
        center_kernel(jnp.zeros((3,)))


def test_stable_variance_is_the_papers():
    n = 576
    assert stable_variance(n, centered=True, after_relu=True) == pytest.approx(
        2 / ((n - 1) * (1 - 1 / np.pi))
    )
    assert stable_variance(n, centered=False, after_relu=True) == 2 / n
    assert stable_variance(n, centered=True, after_relu=False) == 1 / (n - 1)
    assert stable_variance(n, centered=False, after_relu=False) == 1 / n


@pytest.mark.parametrize(("fan_in", "centered"), [(1, True), (0, False)])
def test_stable_variance_of_too_small_a_fan_in_is_an_error(fan_in, centered):
    with pytest.raises(ValueError, match="fan_in"):
        stable_variance(fan_in, centered=centered, after_relu=True)


@pytest.mark.parametrize(
    ("width", "centered", "after_relu"),
    list(itertools.product((64, 512, 4096), (True, False), (True, False))),
)
def test_stable_variance_keeps_the_second_moment_at_one(width, centered, after_relu):
    x = normal(1, (256, width))
    init = stable_normal(width, centered=centered, after_relu=after_relu)
    dense = WeightMeanDense if centered else ScaledDense
    layer = dense(width, 2048, kernel_init=init, rngs=nnx.Rngs(0))
    y = layer(nnx.relu(x) if after_relu else x)
    assert jnp.mean(y**2) == pytest.approx(1.0, abs=0.05)


CONVOLUTIONS = [
    {"kernel_size": (3, 3), "padding": "SAME"},
    {"kernel_size": (3, 3), "strides": 2, "padding": 1},
    {"kernel_size": (3, 1), "strides": (1, 2), "padding": "VALID"},
    {"kernel_size": (3, 3), "padding": ((0, 1), (2, 0)), "kernel_dilation": 2},
    {"kernel_size": (3, 3), "feature_group_count": 4, "use_bias": False},
    {"kernel_size": (1, 1), "padding": 0},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_weight_mean_conv_is_flaxs_convolution_of_the_centred_kernel(options, float64):
    ours = WeightMeanConv(8, 12, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(8, 12, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    theirs.kernel[...] = center_kernel(ours.kernel[...])
    if ours.bias is not None:
        ours.bias[...] = theirs.bias[...] = normal(3, (12,), jnp.float64)
    x = normal(2, (2, 9, 8, 8), jnp.float64)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_weight_mean_dense_is_flaxs_linear_of_the_centred_kernel(float64):
    ours = WeightMeanDense(8, 12, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(8, 12, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    theirs.kernel[...] = center_kernel(ours.kernel[...])
    x = normal(2, (5, 8), jnp.float64)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [WeightMeanConv, ScaledConv])
def test_folded_scale_equals_scaled_activation(layer, float64):
    folded = layer(4, 6, (3, 3), scale=0.7, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    folded.bias[...] = normal(1, (6,), jnp.float64)
    graph, params = nnx.split(folded)
    x = normal(2, (3, 5, 5, 4), jnp.float64)

    def with_folded(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

    def with_activation(params, x):
        conv = nnx.merge(graph, params)
        scale, conv.scale = conv.scale[...], None
        return jnp.sum(jnp.sin(scale * conv(x)))

    expected = jax.value_and_grad(with_activation, argnums=(0, 1))(params, x)
    got = jax.value_and_grad(with_folded, argnums=(0, 1))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, expected
    )
    assert abs(got[1][0].scale[...]) > 0


def test_projected_layers_start_centred_and_do_not_centre_in_the_forward_pass():
    conv = WeightMeanConv(16, 8, (3, 3), weight_mean="projected", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(conv.kernel[...].mean((0, 1, 2)), 0.0, atol=1e-7)
    conv.kernel[...] += 1.0
    with pytest.warns(UserWarning, match="not centred: its optimizer needs project_weight_mean"):
        assert jnp.allclose(conv.effective_kernel(), conv.kernel[...])


def test_the_kernel_is_centred_in_float32_under_bfloat16():
    dense = WeightMeanDense(4096, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert dense.effective_kernel().dtype == jnp.float32
    assert dense(jnp.ones((2, 4096))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: WeightMeanConv(4, 4, (3, 3), weight_mean="both", rngs=r), "weight_mean"),
        (lambda r: WeightMeanDense(4, 4, weight_mean="none", rngs=r), "weight_mean"),
        (lambda r: WeightMeanConv(4, 6, (3, 3), feature_group_count=4, rngs=r), "out_features"),
        (lambda r: WeightMeanConv(4, 4, (3, 3), rngs=r)(jnp.zeros((2, 8, 8, 3))), "got shape"),
        (lambda r: WeightMeanConv(4, 4, (3, 3), rngs=r)(jnp.zeros((8, 4))), "got shape"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


def test_numpy_integers_are_integers():
    layer = WeightMeanConv(2, 3, (3, 3), np.int64(2), padding=np.int64(1), rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 8, 8, 2))).shape == (1, 4, 4, 3)
