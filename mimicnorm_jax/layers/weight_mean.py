"""Weight mean, the first of MimicNorm's two operations, as layers.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020). Equation and appendix numbers below are that paper's.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimicnorm_jax.layers.convolution import convolve
from mimicnorm_jax.layers.convolution_forms import Geometry
from mimicnorm_jax.layers.storage import Codec

WeightMean = Literal["reparameterized", "projected"]
Initializer = Callable[..., jax.Array]
_ZEROS: Initializer = nnx.initializers.zeros_init()
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type in which kernels are centred and logits normalized."""
    return jnp.promote_types(dtype, jnp.float32)


def center_kernel(kernel: jax.Array) -> jax.Array:
    """Subtracts from every output channel the mean of its weights (Section 4).

    Args:
      kernel: ``(..., fan_in axes, out)`` such as HWIO or IO; at least 2 axes. The mean
        is taken over all axes but the last, in at least float32.

    Returns:
      The centred kernel, of the shape and type of ``kernel``.

    Raises:
      ValueError: the kernel has fewer than 2 axes, so that a channel has no weights
        to take the mean of.
    """
    if kernel.ndim < 2:
        raise ValueError(f"a kernel has at least 2 axes (..., out), got shape {kernel.shape}")
    wide = kernel.astype(at_least_float32(kernel.dtype))
    centered = wide - jnp.mean(wide, axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    return centered.astype(kernel.dtype)


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
    fan_in: int, *, centered: bool, after_relu: bool, gain: float = 1.0
) -> Initializer:
    """Normal initializer of mean 0 and variance ``gain**2 * stable_variance``.

    It is a function ``(key, shape, dtype)``. ``gain`` multiplies the standard deviation; other
    arguments and errors are those of ``stable_variance``.
    """
    variance = stable_variance(fan_in, centered=centered, after_relu=after_relu)
    return nnx.initializers.normal(gain * math.sqrt(variance))


class ScaledKernel(nnx.Module):
    """Base of the layers: a kernel, a bias and a learnable scalar that multiplies both."""

    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None
    scale: nnx.Param[jax.Array] | None
    weight_mean: WeightMean | None = None
    after_relu: bool = True

    def _create(
        self,
        kernel_shape: tuple[int, ...],
        *,
        use_bias: bool,
        scale: float | None,
        kernel_init: Initializer | None,
        bias_init: Initializer,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        if kernel_init is None:
            kernel_init = stable_normal(
                math.prod(kernel_shape[:-1]),
                centered=self.weight_mean is not None,
                after_relu=self.after_relu,
            )
        kernel = kernel_init(rngs.params(), kernel_shape, param_dtype)
        if self.weight_mean == "projected":
            kernel = center_kernel(kernel)
        self.kernel = nnx.Param(kernel)
        bias_shape = kernel_shape[-1:]
        self.bias = (
            nnx.Param(bias_init(rngs.params(), bias_shape, param_dtype)) if use_bias else None
        )
        self.scale = None if scale is None else nnx.Param(jnp.asarray(scale, param_dtype))

    def unscaled_kernel(self) -> jax.Array:
        """The kernel, centred where it is to be, in at least float32."""
        kernel = self.kernel[...]
        kernel = kernel.astype(at_least_float32(kernel.dtype))
        return center_kernel(kernel) if self.weight_mean == "reparameterized" else kernel

    def effective_kernel(self) -> jax.Array:
        """The kernel that meets the input: ``scale * center(kernel)`` where centred."""
        kernel = self.unscaled_kernel()
        return kernel if self.scale is None else kernel * self.scale[...]

    def effective_bias(self) -> jax.Array | None:
        """``scale * bias``, or None without a bias."""
        if self.bias is None or self.scale is None:
            return None if self.bias is None else self.bias[...]
        return self.bias[...] * self.scale[...]

    def _computed_in(self, inputs: jax.Array, dtype: DTypeLike | None) -> jnp.dtype:
        return jnp.result_type(inputs, self.kernel[...]) if dtype is None else jnp.dtype(dtype)

    def _with_bias(self, outputs: jax.Array) -> jax.Array:
        bias = self.effective_bias()
        if bias is None:
            return outputs
        shape = (1,) * (outputs.ndim - 1) + (-1,)
        return outputs + bias.astype(outputs.dtype).reshape(shape)


def _per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    return (value,) * axes if isinstance(value, numbers.Integral) else tuple(value)


def _lax_padding(padding: Padding, axes: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME', 'VALID' or numbers, got {padding!r}")
        return padding
    sides = _per_axis(padding, axes)
    pairs = ((s, s) if isinstance(s, numbers.Integral) else s for s in sides)
    return tuple((int(low), int(high)) for low, high in pairs)


class ScaledConv(ScaledKernel):
    """Convolution whose output is multiplied by a learnable scalar, at no cost.

    ``scale * (conv(x, kernel) + bias)`` is computed as ``conv(x, scale * kernel) +
    scale * bias`` (Appendix C): the scalar's gradient needs no stored activation.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one integer per spatial axis.
      strides: one integer, or one per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, one integer for all sides, or one integer or
        ``(low, high)`` pair per spatial axis.
      kernel_dilation: one integer, or one per spatial axis.
      feature_group_count: number of groups the channels are split into.
      use_bias: whether a bias is added.
      scale: initial value of the learnable scalar; None for no scalar.
      dtype: type of the computation; None promotes input and kernel.
      param_dtype: type of the parameters.
      precision: ``jax.lax.Precision`` of the convolution.
      codec: how the input is kept for the backward pass; None: as it is.
      narrow: as for ``convolve``.
      kernel_init: initializer ``(key, shape, dtype)``; default: ``stable_normal`` for
        a rectified input.
      bias_init: initializer of the bias.
      rngs: the ``params`` stream is used.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        scale: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        codec: Codec | None = None,
        narrow: bool = True,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % feature_group_count:
                raise ValueError(
                    f"{name}={features} does not divide by "
                    f"feature_group_count={feature_group_count}"
                )
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        shape = (*size, in_features // feature_group_count, out_features)
        self._create(
            shape,
            use_bias=use_bias,
            scale=scale,
            kernel_init=kernel_init,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = size
        self.strides = _per_axis(strides, len(size))
        self.padding = _lax_padding(padding, len(size))
        self.kernel_dilation = _per_axis(kernel_dilation, len(size))
        self.feature_group_count = feature_group_count
        self.dtype = dtype
        self.precision = precision
        self.codec = codec
        self.narrow = narrow

    def __call__(self, inputs: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        """Convolves ``(B, *spatial, in_features)`` to ``(B, *spatial', out_features)``.

        Args:
          inputs: the input.
          offset: a scalar added to the input before it is padded.
        """
        axes = len(self.kernel_size)
        if inputs.ndim != axes + 2 or inputs.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input of {axes} spatial axes (B, ..., {self.in_features}), "
                f"got shape {inputs.shape}"
            )
        geometry = Geometry(
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.feature_group_count,
            self.precision,
        )
        outputs = convolve(
            inputs.astype(self._computed_in(inputs, self.dtype)),
            self.unscaled_kernel(),
            geometry,
            scale=None if self.scale is None else self.scale[...],
            offset=offset,
            codec=self.codec,
            narrow=self.narrow,
        )
        return self._with_bias(outputs)


class ScaledDense(ScaledKernel):
    """Dense layer whose output is multiplied by a learnable scalar, folded in.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      use_bias, scale, dtype, param_dtype, precision, kernel_init, bias_init, rngs: as
        for ``ScaledConv``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        scale: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
    ):
        self._create(
            (in_features, out_features),
            use_bias=use_bias,
            scale=scale,
            kernel_init=kernel_init,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.precision = precision

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        dtype = self._computed_in(inputs, self.dtype)
        kernel = self.effective_kernel().astype(dtype)
        return self._with_bias(jnp.matmul(inputs.astype(dtype), kernel, precision=self.precision))


def _check_weight_mean(weight_mean: str) -> None:
    if weight_mean not in get_args(WeightMean):
        raise ValueError(
            f"weight_mean must be one of {', '.join(get_args(WeightMean))}, got {weight_mean!r}"
        )


class WeightMeanConv(ScaledConv):
    """Convolution with ``kernel = scale * center(W)``: the paper's weight mean.

    Example::

      conv = WeightMeanConv(64, 128, (3, 3), rngs=nnx.Rngs(0))
      conv(images)  # (B, H, W, 64) -> (B, H, W, 128)

    Args:
      weight_mean: ``"reparameterized"``: the forward pass centres the kernel: right with
        any optimizer. ``"projected"`` (Appendix C): the stored kernel is centred here,
        at the start, and must be kept so by ``project_weight_mean``; nothing is done in
        the forward or backward pass.
      after_relu: whether the input is rectified; it decides the initial variance.

    The other arguments are those of ``ScaledConv``, in the same order; the default
    ``kernel_init`` is ``stable_normal`` for a centred kernel.

    Raises:
      ValueError: an unknown ``weight_mean``, what ``ScaledConv`` refuses, or a fan-in of 1,
        of which centring leaves nothing.
    """

    def __init__(
        self,
        *args: Any,
        weight_mean: WeightMean = "reparameterized",
        after_relu: bool = True,
        **kwargs: Any,
    ):
        _check_weight_mean(weight_mean)
        self.weight_mean = weight_mean
        self.after_relu = after_relu
        super().__init__(*args, **kwargs)


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
        _check_weight_mean(weight_mean)
        self.weight_mean = weight_mean
        self.after_relu = after_relu
        super().__init__(*args, **kwargs)
