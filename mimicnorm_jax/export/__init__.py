"""Networks out of here: ONNX, StableHLO, and weights as safetensors."""

from mimicnorm_jax.export.onnx import export_onnx
from mimicnorm_jax.export.prepared import About
from mimicnorm_jax.export.safetensors import export_safetensors, load_safetensors
from mimicnorm_jax.export.stablehlo import export_stablehlo
from mimicnorm_jax.export.written import Exported

__all__ = [
    "About",
    "Exported",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "load_safetensors",
]
