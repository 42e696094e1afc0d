"""NNGP and NTK of infinitely wide networks with BatchNorm, on a real batch.

Theorem 2 has infinitely many uncorrelated inputs. On a batch of B examples a channel is a
Gaussian vector h of B pre-activations, and BatchNorm makes of it ``y = H h / |H h| sqrt(B)`` with
``H = 1 - 1/B``: the kernel of the next layer is that of a vector on a sphere, not of a Gaussian
(Yang et al. 2019, "A Mean Field Theory of Batch Normalization").
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.theory.dual import dual_activation, safe_sqrt

# 1/x is the integral of exp(-s x) over s > 0, here over t = log s: for such functions the
# trapezoidal rule converges exponentially.
_LOG_SCALES = np.linspace(-24.0, 24.0, 193)


class BatchKernels(NamedTuple):
    """Kernels of what BatchNorm puts out, ``(B, B)`` each."""

    nngp: jax.Array
    ntk: jax.Array


def relu_kernel(kernel: jax.Array) -> jax.Array:
    """``E[relu(u) relu(u)^T]`` of Gaussian vectors u with any covariance ``(..., B, B)``."""
    power = safe_sqrt(jnp.diagonal(kernel, axis1=-2, axis2=-1))
    norms = power[..., :, None] * power[..., None, :]
    positive = norms > 0
    rho = jnp.where(positive, kernel / jnp.where(positive, norms, 1.0), 0.0)
    return norms * dual_activation(rho)


def centered(kernel: jax.Array) -> jax.Array:
    """``H kernel H``: of what is left when the batch's mean is subtracted."""
    rows = kernel - jnp.mean(kernel, axis=-2, keepdims=True)
    return rows - jnp.mean(rows, axis=-1, keepdims=True)


def batch_norm_kernel(kernel: jax.Array) -> jax.Array:
    """One layer of a BatchNorm network on a batch: ReLU, weights, centring, renormalizing.

    ``H dual(K) H``, divided by its mean diagonal. It takes every channel's variance for their
    mean, which is right for batches whose kernel has many eigenvalues of like size. See
    ``batch_kernels`` for the exact kernel.

    Args:
      kernel: ``(B, B)``, the kernel K of what the BatchNorm before put out.

    Returns:
      ``(B, B)``, of mean diagonal 1.
    """
    after = centered(relu_kernel(kernel))
    return after / jnp.mean(jnp.diagonal(after))


def batch_kernels(
    gram: jax.Array, depth: int, *, samples: int = 16384, seed: int = 0
) -> BatchKernels:
    """NNGP and NTK of a BatchNorm network on a batch, at infinite width.

    The network is a dense layer and BatchNorm, then ``depth`` times ReLU, a dense layer and
    BatchNorm; weights have variance 1/n (another one changes nothing). BatchNorm has no epsilon.
    The NNGP is an integral over the scale of a channel. The NTK, in NTK parameterization, is that
    of the map from the parameters to the outputs of the whole batch: BatchNorm's derivative
    ``(H - y y^T / B) / |H h| sqrt(B)`` couples the images. Its mean over channels is taken over
    random ones, ``1/sqrt(samples)`` of whose spread is left as an error; the spread is infinite
    where the centred batch has a rank below 5, such as for less than 6 images.

    Args:
      gram: ``(B, B)``, products of the inputs over their number of features.
      depth: number of ReLUs.
      samples: random channels for the NTK, rounded up to a multiple of 512; 0 leaves it out
        (zeros).
      seed: decides them.

    Raises:
      UserError: a number is below 0, or the batch has fewer than 3 images, of which
        BatchNorm leaves nothing but a sign, or fewer than 4 for the NTK, which is infinite
        for 3.
    """
    gram = jnp.asarray(gram)
    if depth < 0 or len(gram) < 3:
        raise UserError(f"depth = {depth} must be >= 0, and the batch, of {len(gram)}, at least 3")
    if samples < 0 or (samples and len(gram) < 4):
        raise UserError(
            f"samples = {samples} must be >= 0, and 0 for a batch of 3, whose NTK is infinite"
        )
    key = jax.random.key(seed)
    covariance, tangent = centered(gram), gram
    for _ in range(depth):
        key, layer_key = jax.random.split(key)
        after = _after_relu(covariance)
        if samples:
            tangent = after + _through_batch_norm(
                covariance, tangent, layer_key, samples=samples, rectified=True
            )
        covariance = centered(after)
    nngp = _on_sphere(covariance)
    if not samples:
        return BatchKernels(nngp, jnp.zeros_like(nngp))
    return BatchKernels(
        nngp, _through_batch_norm(covariance, tangent, key, samples=samples, rectified=False)
    )


def _scales(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues ``(T, B)`` at every scale s of ``exp(-s |h|^2)``, and the weights ``(T,)``."""
    scales = jnp.asarray(np.exp(_LOG_SCALES), values.dtype) / jnp.sum(values)
    shrink = 1.0 + 2.0 * jnp.outer(scales, values)
    step = _LOG_SCALES[1] - _LOG_SCALES[0]
    weights = step * scales * jnp.exp(-0.5 * jnp.sum(jnp.log(shrink), axis=1))
    return values[None] / shrink, len(values) * weights


def _eigen(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(covariance)
    return jnp.maximum(values, 0.0), vectors


def _assembled(values: jax.Array, vectors: jax.Array) -> jax.Array:
    """The matrix of these eigenvalues and eigenvectors."""
    return (vectors * values[None]) @ vectors.T


@jax.jit
def _on_sphere(covariance: jax.Array) -> jax.Array:
    """``E[y y^T]`` of ``y = h sqrt(B) / |h|``."""
    values, vectors = _eigen(covariance)
    shrunk, weights = _scales(values)
    return _assembled(weights @ shrunk, vectors)


@jax.jit
def _after_relu(covariance: jax.Array) -> jax.Array:
    """``E[relu(y) relu(y)^T]`` of ``y = h sqrt(B) / |h|``."""
    values, vectors = _eigen(covariance)
    shrunk, weights = _scales(values)

    def add(total: jax.Array, scale: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        eigenvalues, weight = scale
        return total + weight * relu_kernel(_assembled(eigenvalues, vectors)), None

    return jax.lax.scan(add, jnp.zeros_like(covariance), (shrunk, weights))[0]


@functools.partial(jax.jit, static_argnames=("samples", "rectified"))
def _through_batch_norm(
    covariance: jax.Array, tangent: jax.Array, key: jax.Array, *, samples: int, rectified: bool
) -> jax.Array:
    """``E[J tangent J^T]``, J the derivative of BatchNorm, or of the ReLU of it."""
    values, vectors = _eigen(covariance)
    batch = len(values)
    tangent = centered(tangent)

    def of_channel(key: jax.Array) -> jax.Array:
        h = vectors @ (jnp.sqrt(values) * jax.random.normal(key, (batch,), values.dtype))
        square = jnp.sum(jnp.square(h))
        along = tangent @ h / square
        outer = jnp.outer(h, along)
        moved = tangent - outer - outer.T + jnp.outer(h, h) * (h @ along) / square
        if rectified:
            moved = moved * jnp.outer(h > 0, h > 0)
        return moved * batch / square

    def add(total: jax.Array, keys: jax.Array) -> tuple[jax.Array, None]:
        return total + jnp.sum(jax.vmap(of_channel)(keys), axis=0), None

    chunk = 512
    keys = jax.random.split(key, (-(-samples // chunk), chunk))
    total, _ = jax.lax.scan(add, jnp.zeros_like(covariance), keys)
    return total / keys.size
