"""Pools of signals: where the theory needs more than single positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.theory import marginal as marginals
from mimicnorm_jax.theory.signal import (
    Offset,
    Signal,
    after_stride,
    divide,
    other_images,
    partners_of,
    take,
    window_correlation,
    window_mean,
)

_CORRELATIONS_OF_MAXIMA = 17


@functools.partial(jax.jit, static_argnames=("window", "stride", "padding", "plain"))
def max_pool(
    signal: Signal, *, window: int, stride: int, padding: int = 0, plain: bool = False
) -> Signal:
    """Maximum over windows.

    Approximations: the positions of a window have the same moment and one correlation,
    their means, and are a Gaussian copula; so are the maxima of two windows. Two windows
    of one image have the same correlation between any two positions; of two images, the
    positions are as correlated as equal positions are.
    """
    count = window**2
    table = marginals.correlation_table(signal.marginal)
    mean_over_window = functools.partial(
        window_mean, size=(window, window), stride=stride, padding=((padding, padding),) * 2
    )
    inside = mean_over_window(jnp.ones_like(signal.moment))  # padding never is the maximum

    linear = mean_over_window(window_correlation(signal, (window, window))) / inside
    square = jnp.square(marginals.expectation(signal.marginal))
    # from correlations, which are about the mean, to cosines, which the table is of
    rho = marginals.copula_correlation(square + (1 - square) * linear, table)
    rho = jnp.clip(rho, 0.0, 1.0)

    grid = jnp.linspace(0.0, 1.0, _CORRELATIONS_OF_MAXIMA)
    maxima = jax.vmap(lambda r: marginals.maximum_of(signal.marginal, count, r))(grid)
    moment = mean_over_window(signal.moment) / inside
    mean = jnp.sqrt(moment) * jnp.interp(rho, grid, marginals.expectation(maxima))
    moment = moment * jnp.interp(rho, grid, marginals.expectation(jnp.square(maxima)))
    new = marginals.normalize(marginals.maximum_of(signal.marginal, count, jnp.mean(rho)))

    kept, offsets = after_stride(signal, stride)
    norms = mean_over_window(jnp.sqrt(signal.moment)) / inside
    cosines = divide(
        mean_over_window(kept) / inside[None], norms[None] * partners_of(norms, offsets)
    )
    spread = rho + (1 - rho) * marginals.maximum_variance(count)
    spreads = jnp.sqrt(spread[None] * partners_of(spread, offsets))
    other_image = jnp.array([offset.images > 0 for offset in offsets], bool)[:, None, None, None]
    latent = marginals.copula_correlation(cosines, table)
    latent = jnp.clip(jnp.where(other_image, latent, divide(latent, spreads)), -1.0, 1.0)
    power = jnp.sqrt(moment)
    after = marginals.cosine_of(latent, marginals.correlation_table(new))
    return Signal(
        mean=mean,
        moment=moment,
        products=power[None] * partners_of(power, offsets) * after,
        marginal=new,
        offsets=offsets,
        features=signal.features,
    )


def flatten(signal: Signal) -> Signal:
    """All positions of all channels as the features of one position."""
    _, height, width = signal.moment.shape
    offsets = other_images(signal)
    return Signal(
        mean=jnp.mean(signal.mean, axis=(1, 2), keepdims=True),
        moment=jnp.mean(signal.moment, axis=(1, 2), keepdims=True),
        products=jnp.mean(take(signal, offsets), axis=(2, 3), keepdims=True),
        marginal=signal.marginal,
        offsets=offsets,
        features=signal.features * height * width,
    )


def mean_covariance(signal: Signal, images: int) -> jax.Array:
    """Mean covariance ``(B,)`` of any position of an image with any of the image ``images`` on.

    Approximation: it depends on the distance of the positions alone, linearly between the
    known distances and not at all beyond them.
    """
    _, height, width = signal.moment.shape
    known = tuple(
        o for o in signal.offsets if o.images == images and abs(o.dy) < height and abs(o.dx) < width
    )
    means = signal.mean[None] * partners_of(signal.mean, known)
    covariances = jnp.sum(take(signal, known) - means, axis=(2, 3))
    places = jnp.array([(height - abs(o.dy)) * (width - abs(o.dx)) for o in known], means.dtype)
    covariances /= places[:, None]
    if not images:
        known = (Offset(0, 0, 0), *known)
        covariances = jnp.concatenate([jnp.mean(signal.variance, axis=(1, 2))[None], covariances])
    return jnp.array(_weights_of_offsets(known, height, width), means.dtype) @ covariances


@functools.cache
def _weights_of_offsets(known: tuple[Offset, ...], height: int, width: int) -> tuple[float, ...]:
    """The part of all pairs of positions that each known offset stands for."""
    distances = np.array([math.hypot(offset.dy, offset.dx) for offset in known])
    levels, level_of = np.unique(distances, return_inverse=True)
    of_level = np.zeros(len(levels))
    for dy in range(-height + 1, height):
        for dx in range(-width + 1, width):
            at = np.interp(math.hypot(dy, dx), levels, np.arange(len(levels)))
            below, pairs = int(at), (height - abs(dy)) * (width - abs(dx))
            of_level[below] += pairs * (1 - (at - below))
            if at > below:
                of_level[below + 1] += pairs * (at - below)
    shared = of_level / np.bincount(level_of) / (height * width) ** 2
    return tuple(shared[level_of].tolist())


def max_pool_activated(
    signal: Signal, activation: Callable[[Signal], Signal], **window: int
) -> Signal:
    """``max_pool(activation(signal))``."""
    return max_pool(activation(signal), **window)


@jax.jit
def global_average_pool(signal: Signal) -> Signal:
    """Mean over all positions; approximation: that of ``mean_covariance``."""
    offsets = other_images(signal)
    mean = jnp.mean(signal.mean, axis=(1, 2), keepdims=True)
    variance = variance_of_mean(signal)[:, None, None]
    covariances = [mean_covariance(signal, offset.images) for offset in offsets]
    products = jnp.array(covariances).reshape(-1, *mean.shape)
    greatest = jnp.sqrt(variance[None] * partners_of(variance, offsets))
    return Signal(
        mean=mean,
        moment=jnp.square(mean) + variance,
        products=mean[None] * partners_of(mean, offsets) + jnp.clip(products, -greatest, greatest),
        marginal=signal.marginal,
        offsets=offsets,
        features=signal.features,
    )


def variance_of_mean(signal: Signal) -> jax.Array:
    """Variance ``(B,)`` of the mean over all positions; approximation: ``mean_covariance``."""
    greatest = jnp.mean(signal.variance, axis=(1, 2))
    return jnp.clip(mean_covariance(signal, 0), 0.0, greatest)
