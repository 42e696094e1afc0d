#!/usr/bin/env bash
# jax 0.10.1, jaxlib 0.10.1, jax-cuda12-plugin 0.10.1, jax-cuda12-pjrt 0.10.1, numpy 2.4.2
#
# Source: JAX's documentation shows ahead-of-time compilation for devices that are not here with TPU
# topologies (jax.experimental.topologies, "Ahead-of-time lowering and compilation"). For a GPU one expects to need
# a GPU, or at least CUDA, cuDNN and nvcc.
#
# Behaviour: the two wheels of the plugin suffice (170 MB, without any of NVIDIA's libraries). With a description
# of the GPU as XLA's GpuTargetConfigProto, in text, in the argument target_config, get_topology_desc("", "cuda")
# gives a device, for which programs compile and tell their memory. On an H100 the same compiler
# allotted as much, to the MiB, to training steps of ResNets. But this works only where JAX_PLATFORMS leaves CUDA out
# (or JAX_SKIP_CUDA_CONSTRAINTS_CHECK is set): else the plugin looks for CUDA's libraries, does not
# register, and the error speaks of something else.
#
# Output seen:
#   without JAX_PLATFORMS: NotImplementedError: topology not implemented for cuda
#   JAX_PLATFORMS=cpu: NVIDIA H100 80GB HBM3, 64.1 MiB of results, 64.1 MiB of temporaries
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" jax==0.10.1 jaxlib==0.10.1 numpy==2.4.2
"${pip[@]}" --no-deps jax-cuda12-plugin==0.10.1 jax-cuda12-pjrt==0.10.1
cat >"$folder/describe.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
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
try:
    gpu = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
except NotImplementedError as error:
    print(f"NotImplementedError: {error}")
    raise SystemExit(0)
one = NamedSharding(Mesh(np.array(gpu.devices), ("data",)), PartitionSpec())


def loss(kernel, images):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", **options)
    return jnp.sum(jnp.tanh(y).astype(jnp.float32))


kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.bfloat16, sharding=one)
images = jax.ShapeDtypeStruct((512, 32, 32, 64), jnp.bfloat16, sharding=one)
compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, images).compile()
memory = compiled.memory_analysis()
print(
    f"{gpu.devices[0].device_kind}, {memory.output_size_in_bytes / 2**20:.1f} MiB of results, "
    f"{memory.temp_size_in_bytes / 2**20:.1f} MiB of temporaries"
)
PY
unset JAX_PLATFORMS JAX_SKIP_CUDA_CONSTRAINTS_CHECK
without=$("$folder/venv/bin/python" "$folder/describe.py" 2>"$folder/errors" | tail -1)
with=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/describe.py" 2>"$folder/errors" | tail -1)
echo "without JAX_PLATFORMS: $without"
echo "JAX_PLATFORMS=cpu: $with"
[[ $without == "NotImplementedError: topology not implemented for cuda" ]]
[[ $with == "NVIDIA H100 80GB HBM3, "*" MiB of results, "*" MiB of temporaries" ]]
