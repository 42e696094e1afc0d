"""Weight standardization, the baseline that weight mean is the cheap half of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.layers.weight_mean import ScaledConv, ScaledDense, at_least_float32


def standardize_kernel(kernel: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Gives the weights of every output channel mean 0 and standard deviation 1.

    Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", Section 3.

    Args:
      kernel: ``(..., fan_in axes, out)``; the statistics are taken over all axes but the
        last, in at least float32.
      epsilon: added to the variance.

    Returns:
      The standardized kernel, of the shape and type of ``kernel``.
    """
    wide = kernel.astype(at_least_float32(kernel.dtype))
    axes = tuple(range(kernel.ndim - 1))
    centered = wide - jnp.mean(wide, axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=axes, keepdims=True)
    return (centered * lax.rsqrt(variance + epsilon)).astype(kernel.dtype)


class WeightStandardizedConv(ScaledConv):
    """Convolution with a standardized kernel; arguments as for ``ScaledConv``."""

    def unscaled_kernel(self) -> jax.Array:
        """The standardized kernel."""
        return standardize_kernel(self.kernel[...])


class WeightStandardizedDense(ScaledDense):
    """Dense layer with a standardized kernel; arguments as for ``ScaledDense``."""

    def unscaled_kernel(self) -> jax.Array:
        """The standardized kernel."""
        return standardize_kernel(self.kernel[...])
