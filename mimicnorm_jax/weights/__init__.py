"""Weights of other programs in our networks, and of one method in those of another."""

from mimicnorm_jax.weights.files import read_tensors
from mimicnorm_jax.weights.torchvision import LoadReport, load_torch_weights

__all__ = ["LoadReport", "load_torch_weights", "read_tensors"]
