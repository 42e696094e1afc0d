#!/usr/bin/env bash
# jax 0.10.1, jaxlib 0.10.1, jax-cuda12-plugin 0.10.1, jax-cuda12-pjrt 0.10.1, numpy 2.4.2
#
# Source: to save memory in a network of convolutions and ReLUs, one writes ReLU's derivative so that it asks for the sign of its
# output, which the next convolution keeps anyway; then one array of activations a layer is to be kept.
#
# Behaviour: XLA for GPUs keeps two. It fuses ReLU into its uses, and so computes the output again in the backward pass,
# from the convolution's result, which therefore stays as well. jax.nn.relu and the derivative of the output take the
# same. An optimization_barrier behind ReLU in the forward pass halves the memory. (Seen on an H100, where a ResNet-50
# took as much; compiled here for one that is not there.)
#
# Output seen, 12 layers with activations of 32 MiB each:
#   jax.nn.relu 768 MiB, derivative of the output 768 MiB, behind a barrier 416 MiB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" jax==0.10.1 jaxlib==0.10.1 numpy==2.4.2
"${pip[@]}" --no-deps jax-cuda12-plugin==0.10.1 jax-cuda12-pjrt==0.10.1
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - 2>"$folder/errors" <<'PY' || { cat "$folder/errors"; exit 1; }
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H100 = """
  platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"
  dnn_version_info { major: 9 }
  gpu_device_info {
    cuda_compute_capability { major: 9 }
    core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
    threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
    registers_per_core_limit: 65536  registers_per_block_limit: 65536
    shared_memory_per_core: 233472  shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    l2_cache_size: 52428800  device_memory_size: 85520809984  memory_bandwidth: 3352000000000
  }
"""
LAYERS = 12
gpu = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
one = NamedSharding(Mesh(np.array(gpu.devices), ("data",)), PartitionSpec())
kernels = [jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.bfloat16, sharding=one)] * LAYERS
images = jax.ShapeDtypeStruct((256, 32, 32, 64), jnp.bfloat16, sharding=one)


def of_its_output(keep):
    """ReLU whose derivative asks for the sign of its output."""

    @jax.custom_vjp
    def relu(x):
        return jnp.maximum(x, 0)

    def forward(x):
        y = keep(relu(x))
        return y, y

    relu.defvjp(forward, lambda y, gradient: (jnp.where(y > 0, gradient, 0),))
    return relu


def mebibytes(relu):
    def loss(kernels, x):
        for kernel in kernels:
            options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            x = relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(kernels, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


usual = mebibytes(jax.nn.relu)
own = mebibytes(of_its_output(lambda y: y))
behind = mebibytes(of_its_output(lax.optimization_barrier))
print(f"jax.nn.relu {usual:.0f} MiB, derivative of the output {own:.0f} MiB, behind a barrier {behind:.0f} MiB")
activation = 256 * 32 * 32 * 64 * 2 / 2**20
assert own > 1.9 * LAYERS * activation, own
assert behind < 1.2 * LAYERS * activation, behind
PY
