"""What a convolution is given, as ``nnx.Conv`` takes it, in the form that lax takes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax

from mimicnorm_jax.layers.convolution_forms import PADDINGS
from mimicnorm_jax.layers.kernel import Phase

Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]
Steps = int | Sequence[int] | None


def per_axis(name: str, value: Steps, axes: int) -> tuple[int, ...]:
    """One number an axis of the window; None is 1.

    Raises:
      ValueError: not as many, or numbers below 1.
    """
    steps = 1 if value is None else value
    each = (steps,) * axes if isinstance(steps, numbers.Integral) else tuple(steps)  # type: ignore[arg-type]
    if len(each) != axes or any(int(step) != step or step < 1 for step in each):
        raise ValueError(f"{name} must be positive, one number or {axes}, got {value!r}")
    return tuple(int(step) for step in each)


def lax_padding(
    padding: Padding,
    size: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
    input_dilation: tuple[int, ...],
) -> str | tuple[tuple[int, int], ...]:
    """A name of ``PADDINGS``, or ``(low, high)`` an axis; names may be written in any case.

    Raises:
      ValueError: another name, ``"CAUSAL"`` with more than one axis, a name with a dilated input
        (of which lax does not say what it means there), or not a number or pair an axis.
    """
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL":
            if len(size) != 1:
                raise ValueError("padding='CAUSAL' needs a kernel_size of 1 axis")
            return ((kernel_dilation[0] * (size[0] - 1), 0),)
        if name not in PADDINGS:
            allowed = ", ".join((*PADDINGS, "CAUSAL"))
            raise ValueError(f"padding must be {allowed} or numbers, got {padding!r}")
        if set(input_dilation) == {1}:
            return name
        if name != "VALID":
            raise ValueError(f"input_dilation needs padding in numbers or 'VALID', got {padding!r}")
        return ((0, 0),) * len(size)
    whole = isinstance(padding, numbers.Integral)
    sides: Any = (padding,) * len(size) if whole else tuple(padding)  # type: ignore[arg-type]
    pairs = [(side, side) if isinstance(side, numbers.Integral) else tuple(side) for side in sides]
    if len(pairs) != len(size) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding must be a number, or a number or pair for each of {len(size)} axes, got "
            f"{padding!r}"
        )
    return tuple((int(low), int(high)) for low, high in pairs)


def as_one_batch(
    inputs: jax.Array, axes: int, features: int
) -> tuple[jax.Array, tuple[int, ...] | None]:
    """``(B, *spatial, C)`` of an input with any number of batch axes, and these if not one.

    Raises:
      ValueError: too few axes, or another number of channels.
    """
    if inputs.ndim < axes + 1 or inputs.shape[-1] != features:
        raise ValueError(
            f"expected an input of {axes} spatial axes (..., {features}), got shape {inputs.shape}"
        )
    batch = inputs.shape[: inputs.ndim - axes - 1]
    if len(batch) == 1:
        return inputs, None
    return inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :]), batch


def phases(axes: Sequence[int], steps: Sequence[int], dilation: Sequence[int]) -> tuple[Phase, ...]:
    """Those of a kernel whose window is the first of ``axes``, by the input's dilation."""
    window = zip(axes, steps, dilation, strict=False)
    return tuple(Phase(axis, step, apart) for axis, step, apart in window if step > 1)
