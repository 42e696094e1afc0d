"""Norms of signals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mimicnorm_jax.theory import marginal as marginals
from mimicnorm_jax.theory.pooling import mean_covariance, variance_of_mean
from mimicnorm_jax.theory.signal import Signal, divide, other_images, partners_of


@jax.jit
def batch_norm(signal: Signal, scale: jax.Array, bias: jax.Array) -> Signal:
    """BatchNorm by the batch's own statistics, which couple all images and positions.

    With mu_c a channel's mean over the batch, E_c[(x - mu)(x' - mu)] needs E_c[x mu] and
    E_c[mu^2]. Approximations: those of ``global_average_pool``, that a position of an
    image is as correlated with another image's mean as the image's other positions are, and that
    the result is Gaussian. They are rough: mu is a small difference in the correlation of two
    images.

    Args:
      signal: of the input.
      scale: ``(C,)``.
      bias: ``(C,)``.
    """
    batch = len(signal.moment)
    mean = jnp.mean(signal.mean, axis=(1, 2), keepdims=True)
    # E_c[x mu], (B, H, W): of the image itself, and of the others
    fall = divide(variance_of_mean(signal), jnp.mean(signal.variance, axis=(1, 2)))
    with_mean = (signal.mean * mean + fall[:, None, None] * signal.variance) / batch
    for offset in other_images(signal):
        covariance = mean_covariance(signal, offset.images)[:, None, None]
        products = signal.mean * partners_of(mean, (offset,))[0] + covariance
        with_mean += products / batch
        if 2 * offset.images != batch:  # else every pair comes twice as it is
            with_mean += jnp.roll(products, offset.images, axis=0) / batch
    mean_square = jnp.mean(with_mean)
    variance = jnp.mean(signal.moment) - mean_square
    partners = partners_of(with_mean, signal.offsets)
    inside = partners_of(jnp.ones_like(signal.moment), signal.offsets)
    gain, square = jnp.mean(jnp.square(scale)), jnp.mean(jnp.square(bias))
    moment = jnp.maximum(signal.moment - 2 * with_mean + mean_square, 0.0)
    products = signal.products - with_mean[None] - partners + mean_square
    return dataclasses.replace(
        signal,
        mean=jnp.full_like(signal.mean, jnp.mean(bias)),
        moment=gain * divide(moment, variance) + square,
        products=inside * (gain * divide(products, variance) + square),
        marginal=marginals.gaussian(),
    )


@jax.jit
def group_norm(signal: Signal, scale: jax.Array, bias: jax.Array) -> Signal:
    """GroupNorm of a signal of mean 0: every image by its own second moment.

    Args:
      signal: of the input.
      scale: ``(C,)``.
      bias: ``(C,)``.
    """
    power = jnp.mean(signal.moment, axis=(1, 2), keepdims=True) * jnp.ones_like(signal.moment)
    gain, square = jnp.mean(jnp.square(scale)), jnp.mean(jnp.square(bias))
    partners = partners_of(power, signal.offsets)
    inside = partners_of(jnp.ones_like(signal.moment), signal.offsets)
    return dataclasses.replace(
        signal,
        mean=jnp.full_like(signal.mean, jnp.mean(bias)),
        moment=gain * divide(signal.moment, power) + square,
        products=gain * divide(signal.products, jnp.sqrt(power[None] * partners)) + inside * square,
        marginal=marginals.gaussian(),
    )
