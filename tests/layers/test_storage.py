"""Activations in few bits: what is exact, what is rounded, and how far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.layers.convolution import convolve
from mimicnorm_jax.layers.convolution_forms import Geometry
from mimicnorm_jax.layers.relu import relu
from mimicnorm_jax.layers.storage import Codec, codec_of, decode, encode, rounded

CODECS = [Codec(bits, rectified) for bits in (8, 4) for rectified in (True, False)]
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


def activations(codec, shape=(3, 4, 4, 5), dtype=jnp.float32):
    x = 10 * jax.random.normal(jax.random.key(0), shape, dtype)
    return jax.nn.relu(x) if codec.rectified else x


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_code_is_off_by_half_a_step_at_most(codec, batch, dtype):
    x = activations(codec, (batch, 4, 4, 5), dtype)
    stored = encode(x, codec)
    y = decode(stored, codec, jnp.float32)
    assert y.shape == x.shape
    assert np.all(np.abs(y - x) <= (0.5 + 1e-4) * np.asarray(stored.step))
    levels = np.asarray(stored.step) * codec.largest
    np.testing.assert_allclose(levels.ravel(), np.abs(x).max((1, 2, 3)).astype(float), rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_take_the_bytes_that_their_name_says(codec):
    codes = encode(activations(codec, (4, 4, 4, 5)), codec).codes
    assert codes.dtype == jnp.uint8
    assert codes.size == 4 * 4 * 4 * 5 * codec.bits // 8


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_and_the_sign_of_rectified_values_are_exact(bits):
    codec = Codec(bits, rectified=True)
    x = jnp.array([[0.0, 1e-30, 1e-3, 100.0]])
    y = decode(encode(x, codec), codec, jnp.float32)
    np.testing.assert_array_equal(y > 0, x > 0)
    assert np.all(decode(encode(jnp.zeros((2, 3)), codec), codec, jnp.float32) == 0)


@pytest.mark.parametrize("codec", CODECS)
def test_the_bias_and_the_variance_are_those_of_the_documentation(codec):
    """Uniform values: mean error 0 and variance s^2/12."""
    low = 0.0 if codec.rectified else -1.0
    x = jax.random.uniform(jax.random.key(1), (1, 200_000), minval=low, maxval=1.0)
    stored = encode(x, codec)
    error = (decode(stored, codec, jnp.float32) - x) / stored.step
    assert abs(float(error.mean())) < 5 * (1 / 12 / x.size) ** 0.5
    assert float(error.var()) == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_kept_of_an_example_does_not_depend_on_the_others(codec):
    x = activations(codec)
    whole = decode(encode(x, codec), codec, jnp.float32)
    for index in range(3):
        alone = decode(encode(x[index : index + 1], codec), codec, jnp.float32)
        np.testing.assert_allclose(whole[index], alone[0], rtol=1e-6)


def test_only_full_storage_has_no_codec():
    assert codec_of("full", rectified=True) is None
    assert codec_of("int8", rectified=False) == Codec(8, False)
    assert codec_of("int4", rectified=True) == Codec(4, True)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_relu_and_its_gradient_are_exact(bits):
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 5)).at[0, 0, 0, 0].set(0.0)
    y, transpose = jax.vjp(lambda x: relu(x, bits), x)
    expected, expected_transpose = jax.vjp(jax.nn.relu, x)
    np.testing.assert_array_equal(y, expected)
    gradient = jax.random.normal(jax.random.key(1), x.shape)
    np.testing.assert_array_equal(transpose(gradient)[0], expected_transpose(gradient)[0])


def test_gpus_keep_the_output_and_do_not_compute_it_again():
    """Which XLA would do, from what it would then keep as well."""

    def barriers(platform, **options):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(relu(x, **options))))
        traced = jax.jit(gradient).trace(jnp.ones(4))
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return program.count("optimization_barrier")

    usual = barriers("cpu")
    assert barriers("cuda") == barriers("rocm") == usual + 1
    assert barriers("tpu") == usual
    # behind a normalization it may, since that keeps its input
    assert barriers("cuda", normalized=True) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_only_the_kernel_gradient_sees_the_codes(codec, float64):
    x = activations(codec, dtype=jnp.float64)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 6), jnp.float64)
    gradient = jax.random.normal(jax.random.key(2), (3, 4, 4, 6), jnp.float64)
    y, transpose = jax.vjp(lambda x, k: convolve(x, k, GEOMETRY, codec=codec), x, kernel)
    exact, exact_transpose = jax.vjp(lambda x, k: convolve(x, k, GEOMETRY), x, kernel)
    np.testing.assert_array_equal(y, exact)
    to_input, to_kernel = transpose(gradient)
    np.testing.assert_array_equal(to_input, exact_transpose(gradient)[0])
    decoded = decode(encode(x, codec), codec, jnp.float64)
    _, of_decoded = jax.vjp(lambda k: convolve(decoded, k, GEOMETRY), kernel)
    np.testing.assert_allclose(to_kernel, of_decoded(gradient)[0], rtol=1e-12)
    assert np.abs(to_kernel - exact_transpose(gradient)[1]).max() > 1e-6


def test_the_backward_pass_keeps_codes_and_not_the_input():
    x, kernel = activations(CODECS[0], (4, 8, 8, 16)), jnp.ones((3, 3, 16, 4))

    def kept(codec):
        _, transpose = jax.eval_shape(
            lambda x, k: jax.vjp(lambda x, k: convolve(x, k, GEOMETRY, codec=codec), x, k),
            x,
            kernel,
        )
        return [leaf for leaf in jax.tree.leaves(transpose) if leaf.size >= x.size // 2]

    assert {leaf.dtype for leaf in kept(CODECS[0])} == {jnp.dtype("uint8")}
    assert jnp.dtype("float32") in {leaf.dtype for leaf in kept(None)}


def test_bfloat16_is_kept_of_float32_only_where_that_is_what_a_tpu_takes():
    x = jnp.ones((2, 3))
    assert rounded(x).dtype == jnp.bfloat16
    assert rounded(x.astype(jnp.bfloat16)) is None
    with jax.default_matmul_precision("highest"):
        assert rounded(x) is None
