"""Which number type computes and which one is stored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mimicnorm_jax.errors import UserError, unknown

PRECISIONS = ("auto", "float32", "bfloat16", "float64")


class Precision(NamedTuple):
    """Number types of a network.

    Attributes:
      dtype: type of convolutions, matrix products and activations.
      param_dtype: type of parameters, statistics, weight centring, last BN, loss
        and metrics: at least float32.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype


FLOAT32 = Precision(jnp.dtype("float32"), jnp.dtype("float32"))


def resolve_precision(name: str) -> Precision:
    """Turns the name of a precision into number types.

    Args:
      name: ``"float32"``, ``"bfloat16"``, ``"float64"``, or ``"auto"``: bfloat16 on
        GPU and TPU, float32 on CPU (this starts the JAX backend).

    Raises:
      UserError: an unknown name, or float64 while JAX has 64-bit types off.
    """
    if name not in PRECISIONS:
        raise unknown("precision", name, PRECISIONS)
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name == "float64":
        if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise UserError(
                "precision 'float64' needs 64-bit JAX types: set JAX_ENABLE_X64=1 or call "
                'jax.config.update("jax_enable_x64", True) first'
            )
        return Precision(jnp.dtype("float64"), jnp.dtype("float64"))
    return Precision(jnp.dtype(name), jnp.dtype("float32"))
