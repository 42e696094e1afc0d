"""What is done to a batch on the device, inside the training step.

Each example's randomness comes from a key of its own, made of (seed, step, index in the
global batch): it does not depend on which device holds the example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates


def example_keys(seed: int, step: jax.Array, indices: jax.Array) -> jax.Array:
    """One PRNG key an example.

    Args:
      seed: of the run.
      step: scalar.
      indices: ``(B,)`` positions in the global batch.

    Returns:
      ``(B,)`` typed keys.
    """
    # Named, because a user may have another default implementation.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def random_crop(images: jax.Array, keys: jax.Array, *, padding: int) -> jax.Array:
    """Pads with zeros on each side and crops back to size at a random place.

    Args:
      images: ``(B, H, W, C)``.
      keys: ``(B,)``.
      padding: pixels added on each side; offsets are uniform in [0, 2 padding].
    """
    _, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return lax.dynamic_slice(image, (top, left, 0), (height, width, channels))

    return jax.vmap(crop)(padded, keys)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image ``(B, H, W, C)`` left to right with probability 1/2."""
    flips = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def random_rotation(images: jax.Array, keys: jax.Array, *, degrees: float) -> jax.Array:
    """Rotates each image about its centre, with zeros outside, interpolated bilinearly.

    Args:
      images: uint8 ``(B, H, W, C)``.
      keys: ``(B,)``.
      degrees: the angle is uniform in [-degrees, degrees].
    """
    _, height, width, _ = images.shape
    limit = math.radians(degrees)
    y, x = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def rotate(image: jax.Array, key: jax.Array) -> jax.Array:
        angle = jax.random.uniform(key, minval=-limit, maxval=limit)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        rows = cos * y - sin * x + (height - 1) / 2
        columns = sin * y + cos * x + (width - 1) / 2

        def sample(channel: jax.Array) -> jax.Array:
            return map_coordinates(channel, [rows, columns], order=1, mode="constant")

        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image.astype(jnp.float32))

    return jnp.round(jax.vmap(rotate)(images, keys)).astype(images.dtype)


def augment(
    images: jax.Array, keys: jax.Array, *, pad_crop: int, flip: bool, rotation: float = 0.0
) -> jax.Array:
    """The training augmentation of ``config.data``; arguments as above."""
    crop_keys, flip_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if pad_crop:
        images = random_crop(images, crop_keys, padding=pad_crop)
    if flip:
        images = random_flip(images, flip_keys)
    if rotation:
        rotation_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
        images = random_rotation(images, rotation_keys, degrees=rotation)
    return images


def normalize(
    images: jax.Array, *, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype
) -> jax.Array:
    """Turns uint8 into ``(images / 255 - mean) / std`` of type ``dtype``."""
    scaled = images.astype(dtype) / 255
    channels = (1, 1, 1, -1)
    return (scaled - jnp.asarray(mean, dtype).reshape(channels)) / jnp.asarray(std, dtype).reshape(
        channels
    )
