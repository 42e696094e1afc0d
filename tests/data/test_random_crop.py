"""Random crops of random size against their definition (Szegedy et al. 2015)."""

import math

import numpy as np
import pytest

from mimicnorm_jax.data.random_crop import RandomResizedCrop, uniforms

CROP = RandomResizedCrop()
HEIGHT, WIDTH = 375, 500


def crops(crop, height, width, count=4000):
    return [crop.choose(height, width, u) for u in uniforms(0, 1, count, crop.draws)]


def cdf_distance(sample, cdf):
    """Kolmogorov-Smirnov distance of a sample from a distribution."""
    x = np.sort(sample)
    steps = np.arange(len(x) + 1) / len(x)
    values = cdf(x)
    return max(np.max(values - steps[:-1]), np.max(steps[1:] - values))


def test_the_numbers_are_uniform_and_those_of_their_example():
    u = np.array([uniforms(3, step, 20, 22) for step in range(20)])
    assert len(np.unique(u)) == u.size
    assert cdf_distance(u.ravel(), lambda x: x) < 1.63 / math.sqrt(u.size)
    np.testing.assert_array_equal(uniforms(3, 1, 20, 22)[:7], uniforms(3, 1, 7, 22))


def test_a_crop_lies_within_the_image():
    for height, width in ((HEIGHT, WIDTH), (1, 1), (1, 50), (7, 3), (3000, 20)):
        for crop in crops(CROP, height, width, 200):
            assert 0 <= crop.top <= height - crop.height and crop.height > 0
            assert 0 <= crop.left <= width - crop.width and crop.width > 0


def accepted(crop, height, width, count=200_000):
    """Areas and ratios drawn from the definition, where the crop fits into the image."""
    generator = np.random.default_rng(0)
    area = generator.uniform(*crop.scale, count)
    ratio = np.exp(generator.uniform(*np.log(crop.ratio), count))
    across, down = np.sqrt(area * height * width * ratio), np.sqrt(area * height * width / ratio)
    fits = (np.round(across) <= width) & (np.round(down) <= height)
    return area[fits], ratio[fits]


def empirical_cdf(values):
    values = np.sort(values)
    return lambda x: np.searchsorted(values, x) / len(values)


@pytest.mark.parametrize("crop", [CROP, RandomResizedCrop((0.25, 0.5), (0.5, 1.0))])
def test_area_and_ratio_are_distributed_as_defined(crop):
    got = crops(crop, HEIGHT, WIDTH)
    area, ratio = accepted(crop, HEIGHT, WIDTH)
    shares = np.array([c.height * c.width for c in got]) / (HEIGHT * WIDTH)
    ratios = np.array([c.width / c.height for c in got])
    limit = 1.63 / math.sqrt(len(got)) + 0.005  # 1 % level, and what rounding to pixels moves
    assert cdf_distance(shares, empirical_cdf(area)) < limit
    assert cdf_distance(ratios, empirical_cdf(ratio)) < limit


def test_where_nothing_else_constrains_it_the_area_is_uniform():
    shares = [c.height * c.width / 1e6 for c in crops(RandomResizedCrop((0.08, 0.5)), 1000, 1000)]
    assert cdf_distance(shares, lambda x: (x - 0.08) / 0.42) < 1.63 / math.sqrt(len(shares)) + 0.002


def test_places_are_uniform():
    got = crops(CROP, HEIGHT, WIDTH)
    for name, side, extent in (("top", "height", HEIGHT), ("left", "width", WIDTH)):
        room = np.array([extent - getattr(c, side) for c in got])
        at = np.array([getattr(c, name) for c in got])
        relative = (at[room > 50] + 0.5) / (room[room > 50] + 1)
        assert cdf_distance(relative, lambda x: x) < 1.63 / math.sqrt(len(relative)) + 0.01


def test_a_crop_reaches_every_edge():
    for number, at_the_edge in ((0.0, lambda room: 0), (1 - 2**-53, lambda room: room)):
        u = np.append(np.full(CROP.draws - 2, 0.3), [number] * 2)
        crop = CROP.choose(HEIGHT, WIDTH, u)
        assert crop.height < HEIGHT and crop.width < WIDTH
        assert crop.top == at_the_edge(HEIGHT - crop.height)
        assert crop.left == at_the_edge(WIDTH - crop.width)


def test_an_image_too_long_for_any_crop_gives_its_centre():
    got = set(crops(RandomResizedCrop((0.5, 1.0)), 100, 1000, 50))
    (crop,) = got
    assert (crop.height, crop.width) == (100, 133)
    assert (crop.top, crop.left) == (0, 433)
