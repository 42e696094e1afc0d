"""MimicNorm in JAX and Flax: convolutional networks without BatchNorm.

Weight mean and one last BN replace every BatchNorm of a network (Fei et al. 2020).
"""

from mimicnorm_jax.convert import Conversion, Folded, convert, fold
from mimicnorm_jax.convert.derivatives import twice_differentiable
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export import (
    About,
    Exported,
    export_onnx,
    export_safetensors,
    export_stablehlo,
    load_safetensors,
)
from mimicnorm_jax.layers import (
    LastBN,
    ScaledConv,
    ScaledConvTranspose,
    ScaledDense,
    WeightMeanConv,
    WeightMeanConvTranspose,
    WeightMeanDense,
    WeightMeanMask,
    center_kernel,
    last_bn_cross_entropy,
    last_bn_loss_floor,
    project_weight_mean,
    stable_variance,
    weight_mean_mask,
)
from mimicnorm_jax.masks import equinox_mask, haiku_mask, linen_mask
from mimicnorm_jax.methods import METHODS, Method, create_method
from mimicnorm_jax.models import NETWORKS, create_model
from mimicnorm_jax.recalibration import recalibrate
from mimicnorm_jax.runs import evaluate, fit, read_config
from mimicnorm_jax.trained import TrainedNetwork, load
from mimicnorm_jax.version import __version__ as __version__
from mimicnorm_jax.weights import LoadReport, load_torch_weights

__all__ = [
    "METHODS",
    "NETWORKS",
    "About",
    "Conversion",
    "Exported",
    "Folded",
    "LastBN",
    "LoadReport",
    "Method",
    "ScaledConv",
    "ScaledConvTranspose",
    "ScaledDense",
    "TrainedNetwork",
    "UserError",
    "WeightMeanConv",
    "WeightMeanConvTranspose",
    "WeightMeanDense",
    "WeightMeanMask",
    "center_kernel",
    "convert",
    "create_method",
    "create_model",
    "equinox_mask",
    "evaluate",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "fit",
    "fold",
    "haiku_mask",
    "last_bn_cross_entropy",
    "last_bn_loss_floor",
    "linen_mask",
    "load",
    "load_safetensors",
    "load_torch_weights",
    "project_weight_mean",
    "read_config",
    "recalibrate",
    "stable_variance",
    "twice_differentiable",
    "weight_mean_mask",
]
