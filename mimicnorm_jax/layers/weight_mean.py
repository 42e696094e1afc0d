"""Weight mean, the first of MimicNorm's two operations, as layers.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020), Section 4 and Appendix C.
"""

from __future__ import annotations

import inspect
from typing import Any

from mimicnorm_jax.layers.scaled import ScaledConv, ScaledDense, ScaledKernel, WeightMean
from mimicnorm_jax.layers.scaled_transpose import ScaledConvTranspose


class _Centered(ScaledKernel):
    """What the layers add to their base, the second of their two."""

    def __init__(
        self,
        *args: Any,
        weight_mean: WeightMean = "reparameterized",
        after_relu: bool = True,
        **kwargs: Any,
    ):
        self.weight_mean = weight_mean
        self.after_relu = after_relu
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # For help and editors: all arguments, also those that are passed on.
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if _Centered in cls.__bases__:
            base: Any = cls.__bases__[1]
            passed = list(inspect.signature(base.__init__).parameters.values())[1:]
            own = passed + [p for p in own if p.kind is p.KEYWORD_ONLY]
        if _Centered in cls.__bases__ or "__init__" in vars(cls):
            cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]


class WeightMeanConv(_Centered, ScaledConv):
    """Convolution with ``kernel = scale * center(W)``: the paper's weight mean.

    Example::

      conv = WeightMeanConv(64, 128, (3, 3), rngs=nnx.Rngs(0))
      conv(images)  # (B, H, W, 64) -> (B, H, W, 128)

    The mean is taken over the weights that make an output together: all of an output channel's.
    Of those that a mask leaves out it is 0; and where the input is dilated, so that an output
    meets only some places of the window at a time, each of these sets has a mean of its own.

    Args:
      weight_mean: ``"reparameterized"``: the forward pass centres the kernel: right with
        any optimizer. ``"projected"`` (Appendix C): the stored kernel is centred here,
        at the start, and must be kept so by ``project_weight_mean``; nothing is done in
        the forward or backward pass. (A call that is not compiled warns if it is not.)
      after_relu: whether the input is rectified; it decides the initial variance.

    The other arguments are those of ``ScaledConv``, in the same order; the default
    ``kernel_init`` is ``stable_normal`` for a centred kernel.

    Raises:
      ValueError: an unknown ``weight_mean``, what ``ScaledConv`` refuses, a mask with
        ``"projected"``, or a fan-in of 1, of which centring leaves nothing.
    """


class WeightMeanConvTranspose(_Centered, ScaledConvTranspose):  # type: ignore[misc]
    """Transposed convolution with ``kernel = scale * center(W)``; see ``WeightMeanConv``.

    With strides s an output meets every s-th place of the window along an axis. Each of these
    sets has a mean of its own: with one mean for all of them, what the input's mean leaves in
    the output would differ from place to place, as a pattern of period s.

    Args:
      weight_mean, after_relu: as for ``WeightMeanConv``.

    The other arguments are those of ``ScaledConvTranspose``, in the same order.

    Raises:
      ValueError: as ``WeightMeanConv``.
    """


class WeightMeanDense(_Centered, ScaledDense):
    """Dense layer with ``kernel = scale * center(W)``; see ``WeightMeanConv``.

    Args:
      weight_mean, after_relu: as for ``WeightMeanConv``.

    The other arguments are those of ``ScaledDense``, in the same order. It maps
    ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
      ValueError: as ``WeightMeanConv``.
    """
