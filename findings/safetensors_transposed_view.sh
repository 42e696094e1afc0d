#!/usr/bin/env bash
# safetensors.numpy writes a NumPy view in the order of its memory, under the shape of the view: a
# transposed kernel comes back scrambled, and nothing is said.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11 on Linux.
# Source: the documentation of safetensors.numpy.save takes a dictionary of arrays, and names no
# condition on their strides; safetensors.torch.save refuses tensors that are not contiguous.
#
# What one expects: load(save({"x": x}))["x"] equals x for every array, or an error. Whoever brings
# a PyTorch kernel (out, in, height, width) into the layout of JAX does it by transpose, which is a
# view.
# What happens: shape and type are those of the view, the values are those that lie in memory from
# its first element on. Kernels of the same number of inputs and outputs fit the network they are
# loaded into, which then computes nonsense. np.ascontiguousarray before save mends it.
#
# Output seen:
#   contiguous comes back equal: True
#   transposed comes back equal: False
#   every second column comes back equal: False
#   contiguous copy of the transposed comes back equal: True
#   transposed came back as [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], shape (3, 2)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load, save


def back(x):
    return load(save({"x": x}))["x"]


def equal(x):
    return bool(np.array_equal(back(x), x))


whole = np.arange(6, dtype=np.float32).reshape(2, 3)
wide = np.arange(12, dtype=np.float32).reshape(2, 6)
came = back(whole.T)
seen = [
    f"contiguous comes back equal: {equal(whole)}",
    f"transposed comes back equal: {equal(whole.T)}",
    f"every second column comes back equal: {equal(wide[:, ::2])}",
    f"contiguous copy of the transposed comes back equal: {equal(np.ascontiguousarray(whole.T))}",
    f"transposed came back as {came.ravel().tolist()}, shape {came.shape}",
]
print("\n".join(seen))
expected = [
    "contiguous comes back equal: True",
    "transposed comes back equal: False",
    "every second column comes back equal: False",
    "contiguous copy of the transposed comes back equal: True",
    "transposed came back as [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], shape (3, 2)",
]
sys.exit(seen != expected)
PYTHON
