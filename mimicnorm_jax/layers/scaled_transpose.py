"""A transposed convolution with a learnable scalar: ``nnx.ConvTranspose`` with another kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimicnorm_jax.layers.convolution_arguments import Padding, Steps, per_axis, phases
from mimicnorm_jax.layers.kernel import Centering, Initializer
from mimicnorm_jax.layers.scaled import NO_METADATA, ZEROS, Mask, ScaledKernel


class ScaledConvTranspose(ScaledKernel, nnx.ConvTranspose):  # type: ignore[misc]
    """Transposed convolution whose output is multiplied by a learnable scalar, folded in.

    What it computes is ``nnx.ConvTranspose`` of the effective kernel and bias; derivatives are
    JAX's own.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, mask,
        dtype, param_dtype, precision, transpose_kernel, preferred_element_type, bias_init,
        kernel_metadata, bias_metadata, rngs: as for ``nnx.ConvTranspose``; the kernel is
        ``(*window, in, out)``, with ``transpose_kernel`` ``(*window, out, in)``. The name of a
        padding may be written in any case.
      scale: initial value of the learnable scalar; None for no scalar.
      kernel_init: initializer ``(key, shape, dtype)``; default: ``stable_normal`` for a rectified
        input, of the fan-in that an output has: with strides, of some places of the window.

    Raises:
      ValueError: strides or dilations of another length than ``kernel_size``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Steps = None,
        *,
        padding: Padding = "SAME",
        kernel_dilation: Steps = None,
        use_bias: bool = True,
        mask: Any = None,
        scale: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        transpose_kernel: bool = False,
        preferred_element_type: DTypeLike | None = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rngs: nnx.Rngs,
    ):
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        # what the centring is made of must be there before the kernel is drawn
        self.strides = per_axis("strides", strides, len(size))
        self.kernel_dilation = per_axis("kernel_dilation", kernel_dilation, len(size))
        self.transpose_kernel = transpose_kernel
        pair = (in_features, out_features)
        self.kernel_shape = (*size, *(pair[::-1] if transpose_kernel else pair))
        self.mask = held = None if mask is None else Mask(jnp.asarray(mask))
        self._check_weight_mean()
        nnx.ConvTranspose.__init__(
            self,
            in_features,
            out_features,
            size,
            self.strides,
            padding=padding.upper() if isinstance(padding, str) else padding,
            kernel_dilation=self.kernel_dilation,
            use_bias=use_bias,
            mask=held,  # type: ignore[arg-type]
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=self._initializer(kernel_init),
            bias_init=bias_init,
            transpose_kernel=transpose_kernel,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._finish(scale, param_dtype)

    @property
    def centering(self) -> Centering:
        axes = len(self.kernel_shape)
        window = tuple(range(-axes, -2))
        weights = (*window, -1 if self.transpose_kernel else -2)
        dilation: Any = self.kernel_dilation
        steps: Any = self.strides
        return Centering(weights, phases(window, steps, dilation))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``(B, *spatial, in_features)`` to ``(B, *spatial', out_features)``.

        Args:
          inputs: the input; it may have several batch axes, or none.
        """
        bias = self.effective_bias()
        layer = nnx.merge(*nnx.split(self))  # a copy with the same arrays
        layer.kernel = nnx.Param(self.effective_kernel())
        layer.bias = None if bias is None else nnx.Param(bias)
        layer.mask = None  # it is in the kernel
        if self.dtype is None:  # whatever wide type the kernel was centred in
            layer.dtype = self._computed_in(inputs, None)
        return nnx.ConvTranspose.__call__(layer, inputs)
