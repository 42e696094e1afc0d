"""Weight standardization, the baseline that weight mean is the cheap half of."""

from __future__ import annotations

import jax

from mimicnorm_jax.layers.kernel import Centering
from mimicnorm_jax.layers.scaled import ScaledConv, ScaledDense

EPSILON = 1e-5  # added to the variance


def standardize_kernel(kernel: jax.Array, epsilon: float = EPSILON) -> jax.Array:
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
    return Centering(tuple(range(kernel.ndim - 1))).standardized(kernel, epsilon)


class WeightStandardizedConv(ScaledConv):
    """Convolution with a standardized kernel; arguments as for ``ScaledConv``."""

    def unscaled_kernel(self) -> jax.Array:
        """The standardized kernel."""
        return self.centering.standardized(self.kernel[...], EPSILON, self._factors)


class WeightStandardizedDense(ScaledDense):
    """Dense layer with a standardized kernel; arguments as for ``ScaledDense``."""

    def unscaled_kernel(self) -> jax.Array:
        """The standardized kernel."""
        return self.centering.standardized(self.kernel[...], EPSILON, self._factors)
