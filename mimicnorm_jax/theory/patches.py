"""NNGP and NTK of infinitely wide convolutional networks, over pairs of positions.

A kernel is ``(B, B, H, W, H, W)``: of two images, each at a position. A convolution takes its
mean along the diagonal shifts that a patch makes (Arora et al. 2019); a centred one also loses
the product of the two patches' means, where the dense network loses ``dual_activation(0)``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.theory.dual import dual_activation, dual_activation_derivative, safe_sqrt
from mimicnorm_jax.theory.kernels import Kind, stable_weight_variance

_KINDS: tuple[Kind, ...] = ("straight", "weight_mean")


def conv_kernels(
    images: jax.Array, depth: int, kind: Kind, *, kernel_size: int = 3
) -> tuple[jax.Array, jax.Array]:
    """NNGP and NTK of convolutions, ReLUs, global average pooling and a classifier.

    The network is a convolution of the images, then ``depth`` times a ReLU and a convolution
    (all of stride 1, padded with zeros to the same size), a ReLU, the mean over all positions,
    and a dense layer whose weights have variance 1/n. Inner convolutions have the variance that
    keeps the second moment (2 of the dense network, 2/(1-1/pi) with weight mean, over the number
    of inputs); the first one has 1/n or, with weight mean, centred as well, 1/(n-1), which
    makes its kernel the sample covariance of two patches. ``finite.cnn`` is that network.

    Args:
      images: ``(B, H, W, C)``.
      depth: number of convolutions after the first.
      kind: ``"straight"`` or ``"weight_mean"``; the classifier is not centred.
      kernel_size: odd.

    Returns:
      Two ``(B, B)`` matrices of the classifier's outputs. Memory is that of some
      ``(B, B, H, W, H, W)`` arrays.

    Raises:
      UserError: a wrong kind, depth, size or shape, or a first layer of one weight is centred.
    """
    if kind not in _KINDS:
        raise unknown("kind of convolutional network", kind, _KINDS)
    if depth < 0 or kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"depth = {depth} must be >= 0, kernel_size = {kernel_size} odd and >= 1")
    if images.ndim != 4:
        raise UserError(f"images are (B, H, W, C), got shape {images.shape}")
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    centered = kind == "weight_mean"
    channels = images.shape[-1]
    if centered and kernel_size**2 * channels < 2:
        raise UserError("weight mean leaves nothing of a 1x1 convolution of one channel")
    products = jnp.einsum("ahwc,bijc->abhwij", images, images) / channels
    means = jnp.mean(images, axis=-1)
    nngp = _patch_mean(products, kernel_size)
    if centered:
        fan_in = kernel_size**2 * channels
        nngp = (nngp - _outer(_image_patch_mean(means, kernel_size))) * (fan_in / (fan_in - 1))
    tangent = nngp
    variance = stable_weight_variance(kind)
    for _ in range(depth):
        dual, slope, means = _relu(nngp)
        nngp = variance * _patch_mean(dual, kernel_size)
        if centered:
            nngp = nngp - variance * _outer(_image_patch_mean(means, kernel_size))
        tangent = nngp + variance * _patch_mean(slope * tangent, kernel_size)
    dual, slope, _ = _relu(nngp)
    pooled, pooled_tangent = (jnp.mean(x, axis=(2, 3, 4, 5)) for x in (dual, slope * tangent))
    return pooled, pooled + pooled_tangent


def _relu(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E[relu relu], E[relu' relu'] and, ``(B, H, W)``, E[relu] of Gaussians of this kernel."""
    power = safe_sqrt(jnp.einsum("aahwhw->ahw", kernel))
    norms = _outer(power)
    positive = norms > 0
    rho = jnp.where(positive, kernel / jnp.where(positive, norms, 1.0), 0.0)
    return (
        norms * dual_activation(rho),
        dual_activation_derivative(rho),
        power / math.sqrt(2.0 * math.pi),
    )


def _outer(field: jax.Array) -> jax.Array:
    """``(B, H, W)`` to the products ``(B, B, H, W, H, W)``."""
    return jnp.einsum("ahw,bij->abhwij", field, field)


def _patch_mean(kernel: jax.Array, size: int) -> jax.Array:
    """Mean over the shifts of both positions together; what is outside counts as 0."""
    half = size // 2
    padded = jnp.pad(kernel, [(0, 0)] * 2 + [(half, half)] * 4)
    height, width = kernel.shape[2:4]
    total = jnp.zeros_like(kernel)
    for dy in range(size):
        for dx in range(size):
            rows, columns = slice(dy, dy + height), slice(dx, dx + width)
            total = total + padded[:, :, rows, columns, rows, columns]
    return total / size**2


def _image_patch_mean(field: jax.Array, size: int) -> jax.Array:
    """Mean over the patch around each position of ``(B, H, W)``; 0 outside."""
    total = lax.reduce_window(field, 0.0, lax.add, (1, size, size), (1, 1, 1), "SAME")
    return total / size**2
