"""Each operation on signals against the same on arrays of many random channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mimicnorm_jax.layers import center_kernel
from mimicnorm_jax.models import channels as arrays
from mimicnorm_jax.models import pooling as array_pooling
from mimicnorm_jax.theory import normalization, pooling, signal

CHANNELS = 1024


@pytest.fixture(scope="module")
def photos():
    """Four crops ``(4, 16, 16, 3)`` of photographs, of mean 0 and variance 1."""
    from sklearn.datasets import load_sample_images

    crops = [
        image[top : top + 64 : 4, 200:264:4]
        for image in load_sample_images().images
        for top in (100, 300)
    ]
    images = np.stack(crops) / 255.0
    return jnp.asarray((images - images.mean((0, 1, 2))) / images.std((0, 1, 2)), jnp.float32)


def random_convolution(x, seed, *, out=CHANNELS, size=3, centred=False, stride=1, variance=1.0):
    """Pre-activations ``(B, H, W, out)``, the kernel, and what became of a signal."""
    fan_in = size * size * x.shape[-1]
    kernel = jax.random.normal(jax.random.key(seed), (size, size, x.shape[-1], out))
    kernel = kernel * np.sqrt(variance / fan_in)
    kernel = center_kernel(kernel) if centred else kernel
    padding = ((size // 2, size // 2),) * 2
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y, lambda s: signal.convolve(s, kernel, jnp.zeros(out), stride=stride, padding=padding)


@pytest.fixture(scope="module")
def gaussian(photos):
    """Many Gaussian channels on the photographs, and their signal."""
    y, convolve = random_convolution(photos, 0)
    return y, convolve(signal.observe(photos))


@pytest.fixture(scope="module")
def another(photos):
    y, convolve = random_convolution(photos[..., ::-1], 1)
    return y, convolve(signal.observe(photos[..., ::-1]))


def assert_agree(predicted, y, *, rel=0.05, products=0.06, mean=None):
    """The maps of a signal are those of the channels of ``(B, H, W, C)``."""
    measured = signal.observe(y)
    assert predicted.features == y.shape[-1]
    assert predicted.moment.shape == y.shape[:3]
    scale = float(jnp.mean(measured.moment))
    error = np.abs(predicted.moment - measured.moment).mean() / scale
    assert error < rel, error
    error = np.abs(predicted.mean - measured.mean).mean() / np.sqrt(scale)
    assert error < (rel if mean is None else mean), error
    assert predicted.offsets
    for offset, of_offset in zip(predicted.offsets, predicted.products, strict=True):
        same = measured.products[measured.offsets.index(offset)]
        error = np.abs(of_offset - same).mean() / scale
        assert error < products, (offset, error)


def test_a_partner_is_where_its_offset_says_and_0_outside_of_the_image():
    field = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    offsets = ((0, 0, 1), (1, -2, 0), (2, 4, -3), (5, 0, 0), (0, 6, 1))
    expected = np.zeros((len(offsets), *field.shape), np.float32)
    for d, (images, dy, dx) in enumerate(offsets):
        for b, y, x in np.ndindex(field.shape):
            if 0 <= y + dy < 5 and 0 <= x + dx < 4:
                expected[d, b, y, x] = field[(b + images) % 3, y + dy, x + dx]
    found = signal.partners_of(jnp.asarray(field), tuple(signal.Offset(*o) for o in offsets))
    np.testing.assert_array_equal(found, expected)


def test_observation_counts_every_pair_of_images_once(photos):
    observed = signal.observe(photos)
    flat = np.asarray(photos).reshape(4, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(4, 1)]
    assert observed.correlation() == pytest.approx(cosines.mean(), abs=1e-5)
    assert observed.second_moment() == pytest.approx(np.mean(flat**2), rel=1e-5)
    to_the_right = observed.products[observed.offsets.index((0, 0, 2))]
    np.testing.assert_allclose(
        to_the_right[:, :, :-2],
        np.mean(photos[:, :, :-2] * photos[:, :, 2:], axis=-1),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_array_equal(to_the_right[:, :, -2:], 0)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (7, 2)])
def test_a_convolution_of_an_image(photos, centred, size, stride):
    y, convolve = random_convolution(photos, 2, size=size, stride=stride, centred=centred)
    assert_agree(convolve(signal.observe(photos)), y)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_a_convolution_of_few_rectified_channels(gaussian, centred, size):
    """With 8 channels the mean over them fluctuates: a centred kernel loses more."""
    y, s = gaussian
    few = dataclasses.replace(signal.relu(s), features=8)
    measured = predicted = 0.0
    for seed in range(CHANNELS // 8):
        x = jax.nn.relu(y[..., 8 * seed : 8 * seed + 8])
        z, convolve = random_convolution(x, seed, out=16, size=size, centred=centred)
        measured += float(jnp.mean(jnp.square(z)))
        predicted += float(convolve(few).second_moment())
    assert predicted / measured == pytest.approx(1.0, abs=0.03)


def test_a_depthwise_convolution(gaussian):
    y, s = gaussian
    kernel = jax.random.normal(jax.random.key(3), (3, 3, 1, CHANNELS)) / 3
    z = lax.conv_general_dilated(
        jax.nn.relu(y),
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=CHANNELS,
    )
    bias = jnp.zeros(CHANNELS)
    rectified = signal.relu(s)
    predicted = signal.convolve(rectified, kernel, bias, stride=1, padding=((1, 1), (1, 1)))
    assert_agree(predicted, z, rel=0.08, products=0.08)


def test_a_bias_is_added(gaussian):
    """Also where kernel and bias are alike, so that their product counts."""
    y, s = gaussian
    bias = jnp.linspace(-1.0, 2.0, 64)
    kernel = jax.random.normal(jax.random.key(3), (1, 1, CHANNELS, 64)) / 32
    kernel = kernel + 3 * bias[None, None, None] / CHANNELS
    z = jnp.einsum("bhwc,co->bhwo", jax.nn.relu(y), kernel[0, 0]) + bias[None, None, None]
    predicted = signal.convolve(signal.relu(s), kernel, bias, stride=1, padding=((0, 0),) * 2)
    assert_agree(predicted, z, rel=0.06, products=0.08)


def test_relu_of_a_gaussian(gaussian):
    y, s = gaussian
    assert_agree(signal.relu(s), jax.nn.relu(y))


def test_a_sum_and_its_relu(gaussian, another):
    (a, of_a), (b, of_b) = gaussian, another
    total = signal.add(signal.relu(of_a), of_b)
    assert_agree(total, jax.nn.relu(a) + b)
    assert_agree(signal.relu(total), jax.nn.relu(jax.nn.relu(a) + b), rel=0.06, products=0.08)


def test_a_sum_of_signals_with_means(gaussian, another):
    (a, of_a), (b, of_b) = gaussian, another
    total = signal.add(signal.shift(of_a, 0.8), signal.shift(of_b, 0.6))
    assert_agree(total, a + b + 1.4)


def test_a_shift(gaussian):
    y, s = gaussian
    assert_agree(signal.shift(s, 0.7), y + 0.7)
    assert_agree(signal.relu(signal.shift(s, 0.7)), jax.nn.relu(y + 0.7), rel=0.12, products=0.12)


def test_concatenation_and_halves(gaussian, another):
    (a, of_a), (b, of_b) = gaussian, another
    small = b[..., : CHANNELS // 4] * 2
    of_small = dataclasses.replace(
        of_b, moment=4 * of_b.moment, products=4 * of_b.products, features=CHANNELS // 4
    )
    joined = signal.concatenate(of_a, of_small)
    assert_agree(joined, arrays.concatenate(a, small))
    assert_agree(
        signal.relu(joined), jax.nn.relu(arrays.concatenate(a, small)), rel=0.08, products=0.08
    )
    first, second = signal.halves(of_a)
    assert first.features == second.features == CHANNELS // 2


def test_the_identity_shortcut(gaussian):
    y, s = gaussian
    wide = 2 * CHANNELS
    assert_agree(
        signal.identity_shortcut(s, strides=2, features=wide),
        arrays.identity_shortcut(y, strides=2, features=wide),
    )


@pytest.mark.parametrize(("window", "padding"), [(2, 0), (3, 1)])
def test_a_max_pool(gaussian, window, padding):
    y, s = gaussian
    options = {"window": window, "stride": 2, "padding": padding}
    assert_agree(
        pooling.max_pool(signal.relu(s), **options),
        array_pooling.max_pool(jax.nn.relu(y), **options),
        rel=0.13,
        products=0.14,
    )


def test_flatten_and_the_global_average_pool(gaussian):
    y, s = gaussian
    rectified, positive = signal.relu(s), jax.nn.relu(y)
    flat = pooling.flatten(rectified)
    assert flat.features == 16 * 16 * CHANNELS
    assert_agree(flat, positive.reshape(4, 1, 1, -1))
    pooled = pooling.global_average_pool(rectified)
    assert_agree(pooled, jnp.mean(positive, axis=(1, 2), keepdims=True), rel=0.15, products=0.15)


def test_means_over_two_images_covary_as_all_pairs_of_their_positions_do(gaussian):
    """Not as equal positions do, nor less by what one image's positions lose with distance."""
    y, s = gaussian
    measured = signal.observe(jnp.mean(jax.nn.relu(y), axis=(1, 2), keepdims=True))
    predicted = pooling.global_average_pool(signal.relu(s))

    def covariances(pooled):
        others = signal.other_images(pooled)
        means = pooled.mean[None] * signal.partners_of(pooled.mean, others)
        return np.ravel(signal.take(pooled, others) - means)

    of_measured = covariances(measured)
    error = np.abs(covariances(predicted) - of_measured).max()
    assert error < 0.5 * np.abs(of_measured).max()


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16), (1, 1), (5, 3)])
def test_a_pool_of_noise_has_a_moment_and_cosines(shape):
    """Where nothing is correlated, small differences of large sums must not turn negative."""
    noise = jax.random.normal(jax.random.key(0), (3, *shape, 3))
    pooled = pooling.global_average_pool(signal.observe(noise))
    assert np.all(np.asarray(pooled.moment) >= 0)
    assert abs(float(pooled.correlation())) <= 1.0 + 1e-5


def assert_batch_norm_agrees(x, s, *, rel, products):
    """On arrays ``(B, H, W, C)`` and their signal."""
    scale, bias = jnp.full(x.shape[-1], 2.0), jnp.full(x.shape[-1], 0.5)
    norm = nnx.BatchNorm(x.shape[-1], use_running_average=False, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    predicted, y = normalization.batch_norm(s, scale, bias), norm(x)
    assert_agree(predicted, y, rel=rel, products=products, mean=0.3)
    measured = signal.observe(y).correlation()
    assert predicted.correlation() == pytest.approx(float(measured), abs=0.06)


@pytest.mark.parametrize("images", [3, 4])  # an odd and an even number pair differently
def test_batch_norm(photos, images):
    y, convolve = random_convolution(photos[:images], 0)
    s = convolve(signal.observe(photos[:images]))
    assert_batch_norm_agrees(y, s, rel=0.25, products=0.25)


def test_batch_norm_of_images_that_are_alike(photos):
    """What they have in common is in the mean, which is subtracted."""
    common, noise = photos[:1], jax.random.normal(jax.random.key(0), photos.shape)
    alike = common + 0.3 * noise
    y, convolve = random_convolution(alike, 0, size=1)
    s = convolve(signal.observe(alike))
    assert s.correlation() > 0.8
    predicted = normalization.batch_norm(s, jnp.ones(CHANNELS), jnp.zeros(CHANNELS))
    norm = nnx.BatchNorm(CHANNELS, use_running_average=False, rngs=nnx.Rngs(0))
    measured = float(signal.observe(norm(y)).correlation())
    assert predicted.correlation() == pytest.approx(measured, abs=0.1)


def test_group_norm(gaussian):
    y, s = gaussian
    norm = nnx.GroupNorm(CHANNELS, num_groups=32, rngs=nnx.Rngs(0))
    scale, bias = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    assert_agree(normalization.group_norm(s, scale, bias), norm(y))


def test_a_dead_signal_stays_dead():
    dead = signal.observe(jnp.zeros((3, 8, 8, 4)))
    for operation in (
        signal.relu,
        lambda s: signal.relu(signal.add(s, s)),
        lambda s: signal.relu(signal.relu(signal.shift(s, -1.0))),
        lambda s: pooling.max_pool(s, window=2, stride=2),
        pooling.global_average_pool,
    ):
        result = operation(dead)
        for leaf in jax.tree.leaves((result.mean, result.moment, result.products)):
            np.testing.assert_array_equal(leaf, 0)
        assert float(result.correlation()) == 0
