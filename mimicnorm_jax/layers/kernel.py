"""Kernels of weight mean: how they are centred, and the variance that they start with.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020). Equation and appendix numbers below are that paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]
_Array = Any  # jax.Array or np.ndarray


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type in which kernels are centred and logits normalized."""
    return jnp.promote_types(dtype, jnp.float32)


def center_kernel(kernel: jax.Array, axes: int | Sequence[int] | None = None) -> jax.Array:
    """Subtracts from every output channel the mean of its weights (Section 4).

    Args:
      kernel: ``(..., fan_in axes, out)`` such as HWIO or IO; at least 2 axes. The mean
        is taken in at least float32.
      axes: those over which it is taken: all but that of the output channels, and those of a
        stack of kernels. None: all but the last. OIHW has ``(1, 2, 3)``, a stack of HWIO
        ``(-4, -3, -2)``.

    Returns:
      The centred kernel, of the shape and type of ``kernel``.

    Raises:
      ValueError: the kernel has fewer than 2 axes, so that a channel has no weights
        to take the mean of, or not the axes that are given.
    """
    if kernel.ndim < 2:
        raise ValueError(f"a kernel has at least 2 axes (..., out), got shape {kernel.shape}")
    given = (axes,) if isinstance(axes, int) else axes
    chosen = tuple(range(kernel.ndim - 1)) if given is None else tuple(given)
    if not chosen or any(not -kernel.ndim <= axis < kernel.ndim for axis in chosen):
        raise ValueError(f"a kernel of shape {kernel.shape} has no axes {chosen}")
    return Centering(chosen)(kernel)


@dataclasses.dataclass(frozen=True)
class Phase:
    """An axis of the window whose positions meet different outputs.

    Between the values of an input that is dilated (as by the strides of a transposed
    convolution) are zeros. An output meets values at every ``step``-th of the window's places
    only, and which ones they are differs from output to output: its polyphase components.

    Attributes:
      axis: of the kernel.
      step: by which the input is dilated.
      dilation: of the kernel.
    """

    axis: int
    step: int
    dilation: int

    def of_positions(self, size: int) -> np.ndarray:
        """Which of the phases each of ``size`` positions belongs to."""
        return np.arange(size) * self.dilation % self.step


@dataclasses.dataclass(frozen=True)
class Centering:
    """How the kernels of a layer are centred: over those weights that make an output together.

    Attributes:
      axes: of the weights of one output channel.
      phases: of a kernel on a dilated input; each has a mean of its own.
    """

    axes: tuple[int, ...]
    phases: tuple[Phase, ...] = ()

    def __call__(self, kernel: jax.Array, mask: _Array | None = None) -> jax.Array:
        """The centred kernel, in the type of ``kernel``; computed in at least float32.

        Args:
          kernel: with any axes of a stack before its own, if ``axes`` are negative.
          mask: factors of the weights; the result is multiplied by them, and has mean 0 then.
        """
        wide = kernel.astype(at_least_float32(kernel.dtype))
        return self._centered(wide, mask).astype(kernel.dtype)

    def standardized(
        self, kernel: jax.Array, epsilon: float, mask: _Array | None = None
    ) -> jax.Array:
        """The centred kernel over its standard deviation; arguments as for a call."""
        wide = kernel.astype(at_least_float32(kernel.dtype))
        centered = wide - self._mean(wide, mask)
        variance = self._mean(jnp.square(centered), mask)
        standard = centered * jax.lax.rsqrt(variance + epsilon)
        return (standard if mask is None else standard * mask).astype(kernel.dtype)

    def fan_in(self, shape: tuple[int, ...], mask: _Array | None = None) -> Any:
        """How many weights make an output together with each one; broadcasts to ``shape``.

        An array of NumPy, but of a mask that is traced a traced one.
        """
        xp: Any = jnp if isinstance(mask, jax.core.Tracer) else np
        total: Any = 0.0
        for phase in self._phases(shape):
            if mask is None:
                others = (n for n, m in zip(shape, phase.shape, strict=True) if m == 1)
                count = phase.sum() * math.prod(others) / self._channels(shape)
            else:
                kept = phase * (xp.asarray(mask) != 0)
                count = xp.sum(kept, axis=self.axes, keepdims=True)
            total = total + phase * count
        return xp.asarray(total)

    def _channels(self, shape: tuple[int, ...]) -> int:
        """How many output channels a kernel (or stack) has."""
        return math.prod(shape) // math.prod(shape[axis] for axis in self.axes)

    def _centered(self, wide: jax.Array, mask: _Array | None) -> jax.Array:
        centered = wide - self._mean(wide, mask)
        return centered if mask is None else centered * jnp.asarray(mask, wide.dtype)

    def _mean(self, values: jax.Array, mask: _Array | None) -> jax.Array:
        """The mean over the weights of an output; a mask's factors are weights of that mean."""
        if mask is None and not self.phases:
            return jnp.mean(values, axis=self.axes, keepdims=True)
        kept = jnp.ones(values.shape, values.dtype) if mask is None else mask
        mean: Any = 0.0
        for phase in self._phases(values.shape):
            weight = jnp.broadcast_to(jnp.asarray(phase * kept, values.dtype), values.shape)
            total = jnp.sum(weight, axis=self.axes, keepdims=True)
            found = jnp.sum(weight * values, axis=self.axes, keepdims=True)
            mean = mean + phase * (found / jnp.where(total == 0, 1, total))  # empty: 0
        return mean

    def _phases(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """For each of the phases 1 where it is, else 0: of as many axes as ``shape``."""
        lines = []
        for phase in self.phases:
            which = phase.of_positions(shape[phase.axis])
            form = [1] * len(shape)
            form[phase.axis] = -1
            lines.append([(which == one).astype(np.float32).reshape(form) for one in set(which)])
        ones = np.ones((1,) * len(shape), np.float32)
        return [functools.reduce(np.multiply, some, ones) for some in itertools.product(*lines)]


def stable_variance(fan_in: int, *, centered: bool, after_relu: bool) -> float:
    """Initial variance of a weight that keeps the second moment of pre-activations.

    For inputs that are ReLUs of i.i.d. standard Gaussians, or such Gaussians
    themselves, every pre-activation has second moment 1:

    ==========  =========================  ===============
    kernel      input rectified            not rectified
    ==========  =========================  ===============
    centred     2 / ((n-1) (1 - 1/pi))     1 / (n-1)
    plain       2 / n (He et al. 2015)     1 / n
    ==========  =========================  ===============

    The first entry is Section 4 of the paper: a centred kernel sees only the variance
    (1 - 1/pi)/2 of a rectified Gaussian, and centring leaves (n-1)/n of the weights'
    variance (Lemma 1).

    Args:
      fan_in: n, the number of weights of one output channel.
      centered: whether the kernel is centred.
      after_relu: whether the layer's input is rectified.

    Raises:
      ValueError: ``fan_in`` is too small: centring leaves nothing of a single weight.
    """
    smallest = 2 if centered else 1
    if fan_in < smallest:
        raise ValueError(f"fan_in must be at least {smallest}, got {fan_in}")
    if not centered:
        return (2.0 if after_relu else 1.0) / fan_in
    return (2.0 / (1.0 - 1.0 / math.pi) if after_relu else 1.0) / (fan_in - 1)


def stable_normal(
    fan_in: int | np.ndarray | jax.Array, *, centered: bool, after_relu: bool, gain: float = 1.0
) -> Initializer:
    """Normal initializer of mean 0 and variance ``gain**2 * stable_variance``.

    It is a function ``(key, shape, dtype)``. ``gain`` multiplies the standard deviation; other
    arguments and errors are those of ``stable_variance``. ``fan_in`` may be an array that
    broadcasts to the shape, where weights differ in it; what centring leaves nothing of becomes 0.
    """
    if np.ndim(fan_in) == 0:
        variance = stable_variance(int(fan_in), centered=centered, after_relu=after_relu)
        return nnx.initializers.normal(gain * math.sqrt(variance))
    # of a fan-in of 2, times what becomes of it with others: it is proportional to 1 / (n - lost)
    lost = 1 if centered else 0
    variance = stable_variance(2, centered=centered, after_relu=after_relu) * (2 - lost)
    standard = nnx.initializers.normal(gain * math.sqrt(variance))

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **options: Any) -> Any:
        left = jnp.asarray(fan_in, at_least_float32(dtype)) - lost
        shrunk = jnp.where(left > 0, jax.lax.rsqrt(jnp.maximum(left, 1)), 0)
        return standard(key, shape, dtype, **options) * shrunk.astype(dtype)

    return init
