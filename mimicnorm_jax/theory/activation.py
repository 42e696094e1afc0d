"""Any activation φ, by quadrature: what ``dual`` and ``kernels`` say of ReLU in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.layers.activation import Activation, activation_moments, gaussian_quadrature


def chi1_of(phi: Activation, *, centered: bool) -> float:
    """χ₁ of any activation: how much a layer's correlation map stretches at correlation 1.

    ``E φ'(z)² / Var φ(z)`` with centred kernels, ``E φ'(z)² / E φ(z)²`` with plain ones. Above 1
    small differences between images grow from layer to layer (for ReLU with weight mean it is
    1 / (1 - 1/π), Theorem 3); at 1 they stay.

    Args:
      phi: as for ``mimicnorm_jax.layers.activation.activation_moments``.
      centered: whether the kernels are centred.
    """
    moments = activation_moments(phi)
    return moments.slope / moments.seen(centered=centered)


def dual_activation_of(phi: Activation, rho: jax.typing.ArrayLike) -> jax.Array:
    """``E[φ(u) φ(v)]`` of standard Gaussians u and v of correlation rho, for any activation.

    Args:
      phi: as for ``activation_moments``.
      rho: correlations of any shape, in [-1, 1].

    Returns:
      An array of the shape of ``rho``; for ReLU it is ``dual_activation`` to about 1e-5.
    """
    z, weights = (jnp.asarray(array) for array in gaussian_quadrature())
    inside = jnp.abs(z) < 6.5  # (N²) nodes: what lies beyond weighs less than 1e-10
    keep = np.flatnonzero(np.asarray(inside))
    z, weights = z[keep], weights[keep]

    def one(r: jax.Array) -> jax.Array:
        orthogonal = jnp.sqrt(jnp.maximum((1.0 - r) * (1.0 + r), 0.0))
        v = r * z[:, None] + orthogonal * z[None, :]
        return jnp.einsum("i,j,i,ij->", weights, weights, phi(z), phi(v))

    rho = jnp.asarray(rho, z.dtype)
    return jax.lax.map(one, rho.ravel()).reshape(rho.shape)
