"""Writes reference_kernels.json: NNGP and NTK of straight ReLU networks by neural-tangents.

In an environment of its own, as neural-tangents needs an old JAX:

  pip install neural-tangents==0.6.5 jax==0.5.3 jaxlib==0.5.3
  python tests/data/make_reference_kernels.py
"""

import json
import pathlib

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from neural_tangents import stax  # noqa: E402

DEPTHS = (1, 5, 20)


def dense(depth):
    layers = [stax.Relu(), stax.Dense(1, W_std=2**0.5)] * depth
    return stax.serial(stax.Dense(1, W_std=1.0), *layers)


def convolutional(depth):
    def conv(deviation):
        return stax.Conv(1, (3, 3), padding="SAME", W_std=deviation)

    layers = [stax.Relu(), conv(2**0.5)] * depth
    return stax.serial(
        conv(1.0), *layers, stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1, W_std=1.0)
    )


def kernels(network, inputs, depths):
    found = {}
    for depth in depths:
        kernel_function = network(depth)[2]
        got = kernel_function(inputs, None, ("nngp", "ntk"))
        found[depth] = {"nngp": np.asarray(got.nngp).tolist(), "ntk": np.asarray(got.ntk).tolist()}
    return found


def main():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(6, 10))
    vectors[1] = vectors[0] + 1e-3 * random.normal(size=10)  # nearly the same,
    vectors[2] = -vectors[0]  # and the opposite
    vectors *= np.sqrt(10) / np.linalg.norm(vectors, axis=1, keepdims=True)
    images = random.normal(size=(3, 4, 5, 2))
    record = {
        "made_by": "make_reference_kernels.py, neural-tangents 0.6.5, jax 0.5.3, float64",
        "vectors": vectors.tolist(),
        "dense": kernels(dense, vectors, DEPTHS),
        "images": images.tolist(),
        "convolutional": kernels(convolutional, images, (0, 1, 3)),
    }
    path = pathlib.Path(__file__).with_name("reference_kernels.json")
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
