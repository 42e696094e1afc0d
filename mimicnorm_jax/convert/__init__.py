"""Any network: MimicNorm in the place of its BatchNorms, and the plain network for inference."""

from mimicnorm_jax.convert.fold import Folded, fold
from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.convert.network import Conversion, convert
from mimicnorm_jax.convert.plan import Layer, Norm
from mimicnorm_jax.convert.report import LayerReport, Report

__all__ = [
    "Conversion",
    "Folded",
    "Layer",
    "LayerReport",
    "LinenNetwork",
    "Norm",
    "Report",
    "convert",
    "fold",
]
