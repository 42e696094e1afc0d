"""Writes a function of JAX as an ONNX model, equation by equation of its jaxpr."""

from mimicnorm_jax.export.onnx_graph.conversion import to_onnx

__all__ = ["to_onnx"]
