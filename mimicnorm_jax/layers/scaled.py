"""The layers beneath: a kernel, a bias, and a learnable scalar that multiplies both at no cost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimicnorm_jax.layers.convolution import Differentiable, convolve
from mimicnorm_jax.layers.convolution_arguments import (
    Padding,
    Steps,
    as_one_batch,
    lax_padding,
    per_axis,
    phases,
)
from mimicnorm_jax.layers.convolution_forms import Geometry
from mimicnorm_jax.layers.kernel import Centering, Initializer, at_least_float32, stable_normal
from mimicnorm_jax.layers.storage import Codec

WeightMean = Literal["reparameterized", "projected"]
ZEROS: Initializer = nnx.initializers.zeros_init()
NO_METADATA: Mapping[str, Any] = MappingProxyType({})
_DRIFT = 1e-2  # of the weights' deviation: far above what rounding leaves of a centred kernel


class Mask(nnx.Variable[jax.Array]):
    """Factors of a kernel's weights, which are not trained.

    A plain array, as ``nnx.Conv`` has, would be lost where a module is made inside ``jax.jit``.
    """


class ScaledKernel(nnx.Module):
    """Base of the layers: a kernel, a bias and a learnable scalar that multiplies both."""

    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None
    scale: nnx.Param[jax.Array] | None
    kernel_shape: tuple[int, ...]
    mask: Mask | None = None
    weight_mean: WeightMean | None = None
    after_relu: bool = True

    @property
    def centering(self) -> Centering:
        """Which weights the mean is taken over; also of a stack of this layer's kernels."""
        return Centering(tuple(range(-len(self.kernel_shape), -1)))

    @property
    def _factors(self) -> jax.Array | None:
        return None if self.mask is None else self.mask[...]

    def _check_weight_mean(self) -> None:
        """Refuses what has no weight mean; the layer's geometry is known by now."""
        mask = self._factors
        if mask is not None and mask.shape != self.kernel_shape:
            raise ValueError(
                f"mask must have the shape of the kernel {self.kernel_shape}, got {mask.shape}"
            )
        if self.weight_mean is None:
            return
        if self.weight_mean not in get_args(WeightMean):
            raise ValueError(
                f"weight_mean must be one of {', '.join(get_args(WeightMean))}, got "
                f"{self.weight_mean!r}"
            )
        if self.weight_mean == "projected" and mask is not None:
            raise ValueError("a mask needs weight_mean='reparameterized'")
        sizes = self.centering.fan_in(self.kernel_shape, self._factors)
        if not isinstance(sizes, jax.core.Tracer) and (sizes == 1).any():
            raise ValueError(
                f"a kernel of shape {self.kernel_shape} has outputs with a fan-in of 1, and "
                "fan_in must be at least 2: centring leaves nothing of a single weight"
            )

    def _initializer(self, kernel_init: Initializer | None) -> Initializer:
        """What makes the kernel: an own initializer, or ``stable_normal``."""
        if kernel_init is None:
            sizes = self.centering.fan_in(self.kernel_shape, self._factors)
            if not isinstance(sizes, jax.core.Tracer) and sizes.min() == sizes.max():
                sizes = int(sizes.max())
            kernel_init = stable_normal(
                sizes,
                centered=self.weight_mean is not None,
                after_relu=self.after_relu,
            )
        return kernel_init

    def _finish(self, scale: float | None, param_dtype: DTypeLike) -> None:
        """What comes when kernel and bias are there."""
        if self.weight_mean == "projected":
            self.kernel.set_value(self.centering(self.kernel[...]))
        self.scale = None if scale is None else nnx.Param(jnp.asarray(scale, param_dtype))

    def _create(
        self,
        *,
        use_bias: bool,
        scale: float | None,
        kernel_init: Initializer | None,
        bias_init: Initializer,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ) -> None:
        self._check_weight_mean()
        kernel = self._initializer(kernel_init)(rngs.params(), self.kernel_shape, param_dtype)
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = (
            nnx.Param(
                bias_init(rngs.params(), self.kernel_shape[-1:], param_dtype), **bias_metadata
            )
            if use_bias
            else None
        )
        self._finish(scale, param_dtype)

    def unscaled_kernel(self) -> jax.Array:
        """The kernel, centred where it is to be, in at least float32."""
        kernel = self.kernel[...]
        kernel = kernel.astype(at_least_float32(kernel.dtype))
        if self.weight_mean == "reparameterized":
            return self.centering(kernel, self._factors)
        if self.weight_mean == "projected" and is_there(kernel):
            _warn_of_drift(kernel, self.centering)
        return kernel if self.mask is None else kernel * self.mask[...]

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


def is_there(kernel: Any) -> bool:
    """Whether the numbers of a kernel can be looked at: not inside ``jax.jit``."""
    if isinstance(kernel, jax.core.Tracer) or not hasattr(kernel, "astype"):
        return False
    return bool(getattr(kernel, "is_fully_addressable", True))  # NumPy's arrays are


def has_drifted(kernel: Any, centering: Centering) -> bool:
    """Whether a kernel that is there is not centred."""
    with jax.ensure_compile_time_eval():  # a function that is compiled may hold the layer
        kernel = jnp.asarray(kernel)
        rest = kernel - centering(kernel)
        return float(jnp.max(jnp.abs(rest))) > _DRIFT * float(jnp.std(kernel))


def _warn_of_drift(kernel: Any, centering: Centering) -> None:
    if has_drifted(kernel, centering):
        warnings.warn(
            "a kernel with weight_mean='projected' is not centred: its optimizer needs "
            "project_weight_mean(model) as its last transform",
            stacklevel=5,
        )


class ScaledConv(ScaledKernel):
    """Convolution whose output is multiplied by a learnable scalar, at no cost.

    ``scale * (conv(x, kernel) + bias)`` is computed as ``conv(x, scale * kernel) +
    scale * bias`` (Appendix C): the scalar's gradient needs no stored activation.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one integer per spatial axis; a single one for a single axis.
      strides: one integer, or one per spatial axis; None is 1, as for the dilations.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``,
        ``"CAUSAL"`` (one spatial axis), one integer for all sides, or one integer or
        ``(low, high)`` pair per spatial axis.
      input_dilation: one integer, or one per spatial axis.
      kernel_dilation: one integer, or one per spatial axis.
      feature_group_count: number of groups the channels are split into.
      use_bias: whether a bias is added.
      mask: factors of the weights, of the kernel's shape. A centred kernel has mean 0 with it.
      scale: initial value of the learnable scalar; None for no scalar.
      dtype: type of the computation; None promotes input and kernel.
      param_dtype: type of the parameters.
      precision: ``jax.lax.Precision`` of the convolution.
      preferred_element_type: type of the result; None: that of the computation.
      codec: how the input is kept for the backward pass; None: as it is.
      narrow: as for ``convolve``.
      differentiable: as for ``convolve``.
      kernel_init: initializer ``(key, shape, dtype)``; default: ``stable_normal`` for
        a rectified input.
      bias_init: initializer of the bias.
      kernel_metadata, bias_metadata: of the ``nnx.Param``, such as its sharding.
      rngs: the ``params`` stream is used.

    Raises:
      ValueError: features that do not divide by the groups, or arguments of another length than
        ``kernel_size``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Steps = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: Steps = 1,
        kernel_dilation: Steps = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Any = None,
        scale: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        codec: Codec | None = None,
        narrow: bool = True,
        differentiable: Differentiable = "once",
        kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rngs: nnx.Rngs,
    ):
        if differentiable not in get_args(Differentiable):
            raise ValueError(f"differentiable must be 'once' or 'twice', got {differentiable!r}")
        if feature_group_count < 1:
            raise ValueError(f"feature_group_count must be positive, got {feature_group_count}")
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % feature_group_count:
                raise ValueError(
                    f"{name}={features} does not divide by "
                    f"feature_group_count={feature_group_count}"
                )
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = size
        self.kernel_shape = (*size, in_features // feature_group_count, out_features)
        self.strides = per_axis("strides", strides, len(size))
        self.input_dilation = per_axis("input_dilation", input_dilation, len(size))
        self.kernel_dilation = per_axis("kernel_dilation", kernel_dilation, len(size))
        self.padding = lax_padding(padding, size, self.kernel_dilation, self.input_dilation)
        self.feature_group_count = feature_group_count
        self.mask = None if mask is None else Mask(jnp.asarray(mask))
        self.dtype = dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.codec = codec
        self.narrow = narrow
        self.differentiable = differentiable
        self._create(
            use_bias=use_bias,
            scale=scale,
            kernel_init=kernel_init,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )

    @property
    def centering(self) -> Centering:
        plain = super().centering
        return Centering(plain.axes, phases(plain.axes, self.input_dilation, self.kernel_dilation))

    def __call__(self, inputs: jax.Array, *, offset: jax.Array | None = None) -> jax.Array:
        """Convolves ``(B, *spatial, in_features)`` to ``(B, *spatial', out_features)``.

        Args:
          inputs: the input; it may have several batch axes, or none.
          offset: a scalar added to the input before it is padded.

        Raises:
          ValueError: too few axes, or another number of channels.
        """
        inputs, batch = as_one_batch(inputs, len(self.kernel_size), self.in_features)
        geometry = Geometry(
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.feature_group_count,
            self.precision,
            self.input_dilation,
            self.preferred_element_type,
        )
        outputs = convolve(
            inputs.astype(self._computed_in(inputs, self.dtype)),
            self.unscaled_kernel(),
            geometry,
            scale=None if self.scale is None else self.scale[...],
            offset=offset,
            codec=self.codec,
            narrow=self.narrow,
            differentiable=self.differentiable,
        )
        outputs = self._with_bias(outputs)
        return outputs if batch is None else outputs.reshape(*batch, *outputs.shape[1:])


class ScaledDense(ScaledKernel):
    """Dense layer whose output is multiplied by a learnable scalar, folded in.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      use_bias, scale, dtype, param_dtype, precision, preferred_element_type, kernel_init,
        bias_init, kernel_metadata, bias_metadata, rngs: as for ``ScaledConv``.
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
        preferred_element_type: DTypeLike | None = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_shape = (in_features, out_features)
        self.dtype = dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self._create(
            use_bias=use_bias,
            scale=scale,
            kernel_init=kernel_init,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        dtype = self._computed_in(inputs, self.dtype)
        kernel = self.effective_kernel().astype(dtype)
        outputs = jnp.matmul(
            inputs.astype(dtype),
            kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return self._with_bias(outputs)
