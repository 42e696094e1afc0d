#!/usr/bin/env bash
# A convolution of Flax whose kernel_size is a number convolves images along their rows only.
#
# Versions: flax 0.12.8, jax 0.10.1, Python 3.11 on Linux.
# Source: flax/linen/linear.py and flax/nnx/nn/linear.py: a number becomes the tuple (number,), a
# kernel of one spatial axis, and all axes before that and the channels count as batch.
#
# What one expects: kernel_size=3 on (B, H, W, C) is a kernel of 3 x 3, as in torch.nn.Conv2d and in
# keras.layers.Conv2D, or an error, as the number of axes does not fit.
# What happens: no error; the result has the shape of a 3 x 3 convolution (with "SAME", and with
# padding=1), but no pixel sees a row above or below. A third of the weights is there, and the
# network trains. This holds for linen.Conv and nnx.Conv, and for strides and padding of one number,
# which act on the last spatial axis only.
#
# Output seen:
#   linen.Conv(4, 3): kernel (3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 1
#   linen.Conv(4, (3, 3)): kernel (3, 3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 3
#   nnx.Conv(3, 4, 3): kernel (3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 1
#   nnx.Conv(3, 4, (3, 3)): kernel (3, 3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 3
#   linen.Conv(4, 3, strides=2): result (1, 8, 4, 4)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.1 flax==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from flax import linen, nnx

zeros = jnp.zeros((1, 8, 8, 3))
pixel = zeros.at[0, 4, 4].set(1.0)


def rows(convolve):
    """How many rows of the result one pixel changes."""
    changed = jnp.abs(convolve(pixel) - convolve(zeros)).sum((0, 2, 3))
    return int((changed > 0).sum())


seen = []
for size in (3, (3, 3)):
    layer = linen.Conv(4, size)
    variables = layer.init(jax.random.key(0), zeros)
    kernel = variables["params"]["kernel"].shape
    shape = layer.apply(variables, zeros).shape
    reach = rows(lambda x: layer.apply(variables, x))
    seen.append(
        f"linen.Conv(4, {size}): kernel {kernel}, result {shape}, rows that a pixel reaches: {reach}"
    )
for size in (3, (3, 3)):
    layer = nnx.Conv(3, 4, size, rngs=nnx.Rngs(0))
    seen.append(
        f"nnx.Conv(3, 4, {size}): kernel {layer.kernel.shape}, result {layer(zeros).shape}, "
        f"rows that a pixel reaches: {rows(layer)}"
    )
layer = linen.Conv(4, 3, strides=2)
shape = layer.apply(layer.init(jax.random.key(0), zeros), zeros).shape
seen.append(f"linen.Conv(4, 3, strides=2): result {shape}")
print("\n".join(seen))
expected = [
    "linen.Conv(4, 3): kernel (3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 1",
    "linen.Conv(4, (3, 3)): kernel (3, 3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 3",
    "nnx.Conv(3, 4, 3): kernel (3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 1",
    "nnx.Conv(3, 4, (3, 3)): kernel (3, 3, 3, 4), result (1, 8, 8, 4), rows that a pixel reaches: 3",
    "linen.Conv(4, 3, strides=2): result (1, 8, 4, 4)",
]
sys.exit(seen != expected)
PYTHON
