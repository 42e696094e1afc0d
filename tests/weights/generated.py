"""Weights and images as functions of names and shapes, by NumPy only: for JAX and PyTorch."""

import zlib

import numpy as np

NORM = ("weight", "bias", "running_mean", "running_var")
# Of norms in ResNets, whose branches add up, and ShuffleNets, half of which have no ReLU behind.
SCALES = {"layer": 0.6, "stage": 0.9}


def generated(name, shape):
    """A tensor of a state dict, in float32, such that activations stay near 1.

    Kernels are He's, with a mean; norms have statistics unlike those of their inputs, and in
    residual branches a smaller scale, as branches add up.
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = random.uniform(0.7, 1.5, shape)
    elif name.endswith("running_mean"):
        values = random.normal(0.0, 0.2, shape)
    elif name.endswith("weight") and len(shape) == 1:
        values = SCALES.get(name[:5], 1.0) * random.uniform(0.6, 1.4, shape)
    elif name.endswith("weight"):
        values = random.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)
    else:
        values = random.normal(0.0, 0.1, shape)
    return values.astype(np.float32)


def state_dict(shapes):
    """The tensors of ``{name: shape}``."""
    return {name: generated(name, tuple(shape)) for name, shape in shapes.items()}


def images(size):
    """Two images ``(2, size, size, 3)``, in float32."""
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def unpacked(packed):
    """``{name: shape}`` of what ``packed`` makes."""
    found = {}
    for name, shape in packed.items():
        if isinstance(shape, int):
            found |= {f"{name}.{entry}": (shape,) for entry in NORM}
        else:
            found[name] = tuple(shape)
    return found


def packed(shapes):
    """``{name: shape}``, with the four arrays of a norm as one number, its channels."""
    norms = {name.removesuffix(".running_var") for name in shapes if name.endswith("running_var")}
    found = {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        if layer not in norms:
            found[name] = list(shape)
        else:
            found[layer] = shape[0]
    return found
