"""The layers of MimicNorm, its optax transform and its loss."""

from mimicnorm_jax.layers.dropout import Dropout
from mimicnorm_jax.layers.kernel import center_kernel, stable_normal, stable_variance
from mimicnorm_jax.layers.last_bn import LastBN, cross_entropy, last_bn_cross_entropy
from mimicnorm_jax.layers.loss_floor import last_bn_loss_floor
from mimicnorm_jax.layers.projection import (
    WeightMeanMask,
    project_weight_mean,
    weight_mean_mask,
)
from mimicnorm_jax.layers.scaled import ScaledConv, ScaledDense, WeightMean
from mimicnorm_jax.layers.scaled_transpose import ScaledConvTranspose
from mimicnorm_jax.layers.weight_mean import (
    WeightMeanConv,
    WeightMeanConvTranspose,
    WeightMeanDense,
)
from mimicnorm_jax.layers.weight_standardization import (
    WeightStandardizedConv,
    WeightStandardizedDense,
    standardize_kernel,
)

__all__ = [
    "Dropout",
    "LastBN",
    "ScaledConv",
    "ScaledConvTranspose",
    "ScaledDense",
    "WeightMean",
    "WeightMeanConv",
    "WeightMeanConvTranspose",
    "WeightMeanDense",
    "WeightMeanMask",
    "WeightStandardizedConv",
    "WeightStandardizedDense",
    "center_kernel",
    "cross_entropy",
    "last_bn_cross_entropy",
    "last_bn_loss_floor",
    "project_weight_mean",
    "stable_normal",
    "stable_variance",
    "standardize_kernel",
    "weight_mean_mask",
]
