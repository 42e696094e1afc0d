import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.data.augment import (
    augment,
    example_keys,
    normalize,
    random_crop,
    random_flip,
    random_rotation,
)


@pytest.fixture
def images():
    return jax.random.randint(jax.random.key(9), (64, 8, 8, 3), 1, 256).astype(jnp.uint8)


def keys(count, step=0, seed=0):
    return example_keys(seed, jnp.int32(step), jnp.arange(count))


def test_an_examples_key_depends_on_seed_step_and_index_alone():
    whole = jax.random.key_data(keys(8))
    np.testing.assert_array_equal(
        jax.random.key_data(example_keys(0, jnp.int32(0), jnp.arange(4, 8))), whole[4:]
    )
    distinct = {
        tuple(np.asarray(k).tolist())
        for seed in (0, 1)
        for step in (0, 1)
        for k in jax.random.key_data(keys(8, step, seed))
    }
    assert len(distinct) == 32


def test_every_crop_is_a_window_of_the_padded_image_and_all_offsets_occur(images):
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)))
    crops = np.asarray(random_crop(images, keys(64), padding=2))
    offsets = set()
    for image, crop in zip(padded, crops, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(image[top : top + 8, left : left + 8], crop)
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))


def test_a_flip_mirrors_the_width_of_about_half_the_images(images):
    flipped = np.asarray(random_flip(images, keys(64)))
    count = 0
    for image, result in zip(np.asarray(images), flipped, strict=True):
        mirrored = np.array_equal(result, image[:, ::-1])
        assert mirrored or np.array_equal(result, image)
        count += mirrored
    assert 20 <= count <= 44


def test_crop_and_flip_are_independent(images):
    cropped = np.asarray(augment(images, keys(64), pad_crop=2, flip=False))
    both = np.asarray(augment(images, keys(64), pad_crop=2, flip=True))
    assert all(
        np.array_equal(b, c) or np.array_equal(b, c[:, ::-1])
        for b, c in zip(both, cropped, strict=True)
    )
    assert both.dtype == np.uint8


def test_where_an_image_is_cropped_says_nothing_about_its_flip():
    count = 4096
    ramp = jnp.broadcast_to(jnp.arange(1, 9, dtype=jnp.uint8), (count, 8, 8))[..., None]
    augmented = np.asarray(augment(ramp, keys(count), pad_crop=2, flip=True))
    row = augmented[:, 4, :, 0].astype(int)
    flipped = row[:, 2] > row[:, 5]
    left = np.where(flipped[:, None], row[:, ::-1], row)[:, 3] - 2  # offset of the crop
    assert set(left) == set(range(5))
    for offset in range(5):
        assert np.mean(flipped[left == offset]) == pytest.approx(0.5, abs=0.08)


def test_without_options_nothing_is_changed(images):
    np.testing.assert_array_equal(augment(images, keys(64), pad_crop=0, flip=False), images)


def test_normalization_is_in_units_of_one(images):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    got = normalize(images, mean=mean, std=std, dtype=jnp.dtype("float32"))
    expected = (np.asarray(images) / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class TestRotation:
    def test_it_is_that_of_scipy_about_the_centre(self):
        from scipy.ndimage import map_coordinates

        images = np.random.default_rng(0).integers(0, 256, (6, 9, 12, 2), np.uint8)
        got = random_rotation(jnp.asarray(images), keys(6), degrees=15.0)
        angles = jax.vmap(
            lambda key: jax.random.uniform(key, minval=-np.pi / 12, maxval=np.pi / 12)
        )(keys(6))
        y, x = np.mgrid[:9, :12] - np.array([4.0, 5.5])[:, None, None]
        for image, angle, rotated in zip(images, np.asarray(angles, float), got, strict=True):
            rows = np.cos(angle) * y - np.sin(angle) * x + 4.0
            columns = np.sin(angle) * y + np.cos(angle) * x + 5.5
            for channel in range(2):
                expected = map_coordinates(
                    image[..., channel].astype(float),
                    [rows, columns],
                    order=1,
                    mode="grid-constant",
                )
                assert np.abs(rotated[..., channel] - expected).max() < 1.0

    def test_angles_fill_their_range_and_differ(self):
        image = np.zeros((33, 33, 1), np.uint8)
        image[:, 16] = 255  # a line, whose direction tells the angle
        rotated = random_rotation(jnp.tile(image, (200, 1, 1, 1)), keys(200), degrees=15.0)
        weight = np.asarray(rotated[..., 0], float)
        y, x = np.mgrid[:33, :33] - 16
        angles = np.degrees(np.arctan((weight * x * y).sum((1, 2)) / (weight * y * y).sum((1, 2))))
        assert np.abs(angles).max() < 15.5
        assert angles.max() > 13 and angles.min() < -13
        assert abs(angles.mean()) < 2 and len(np.unique(angles.round(3))) > 150

    def test_without_it_nothing_changes(self):
        images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
        options = {"pad_crop": 1, "flip": True}
        np.testing.assert_array_equal(
            augment(images, keys(4), **options), augment(images, keys(4), **options, rotation=0.0)
        )
        rotated = augment(images, keys(4), **options, rotation=30.0)
        assert rotated.dtype == jnp.uint8
        assert not np.array_equal(rotated, augment(images, keys(4), **options))
