"""Weight mean, the first of MimicNorm's two operations, as layers.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020), Section 4 and Appendix C.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from mimicnorm_jax.layers.scaled import ScaledConv, ScaledDense, WeightMean
from mimicnorm_jax.layers.scaled_transpose import ScaledConvTranspose

_Layer = TypeVar("_Layer", bound=type)


def _with_signature(layer: _Layer) -> _Layer:
    """Shows all arguments, for ``help`` and editors, of a layer that passes most of them on."""
    own = inspect.signature(layer.__init__).parameters  # type: ignore[misc]
    passed = inspect.signature(layer.__base__.__init__).parameters  # type: ignore[union-attr, misc]
    added = [p for p in own.values() if p.kind is p.KEYWORD_ONLY]
    layer.__signature__ = inspect.Signature([*list(passed.values())[1:], *added])  # type: ignore[attr-defined]
    return layer


@_with_signature
class WeightMeanConv(ScaledConv):
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


@_with_signature
class WeightMeanConvTranspose(ScaledConvTranspose):
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


@_with_signature
class WeightMeanDense(ScaledDense):
    """Dense layer with ``kernel = scale * center(W)``; see ``WeightMeanConv``.

    Args:
      weight_mean, after_relu: as for ``WeightMeanConv``.

    The other arguments are those of ``ScaledDense``, in the same order. It maps
    ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
      ValueError: as ``WeightMeanConv``.
    """

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
