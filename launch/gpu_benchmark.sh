#!/usr/bin/env bash
# Times the training step on one NVIDIA GPU, next to the same step in PyTorch, and measures its
# memory: ResNet-50 on ImageNet, ResNet-18 and VGG16 on CIFAR-100. Needs no network and no data,
# and takes at most LIMIT seconds (default 530). Numbers go to OUT (default results/gpu), one JSON
# file a part; a part that fails or takes too long does not stop the others, but makes the exit
# code 1.
#   OUT=DIR bash launch/gpu_benchmark.sh
# PYTHON (default python) has jax[cuda], flax, optax, orbax, torch and what else is imported; what
# it lacks may come as wheels in the folder WHEELS. TORCH=no leaves PyTorch's rows out. To try it
# without a GPU:
#   TARGET=cpu BATCH=8 EXTRA='--config.width=0.125 --seconds=0.2 --rounds=2' \
#     bash launch/gpu_benchmark.sh
set -euo pipefail
limit=${LIMIT:-530} # seconds in all: SECONDS counts them from here
source "$(dirname "${BASH_SOURCE[0]}")/gpu_machine.sh"
batch=${BATCH:-256} out=${OUT:-results/gpu}
mkdir -p "$out"

common=("--config.precision=bfloat16" "--config.num_devices=1" "--batch=$batch")
ours=batchnorm,mimicnorm,nonorm
int8=mimicnorm:activation_storage=int8
code=0

step() { # CONFIG METHODS SECONDS [NAME]: numbers go to step_CONFIG.json, or NAME_CONFIG.json
  local name=${4:-step}
  part "$name of $1" "$3" "$python" -m mimicnorm_jax.tools.benchmark step \
    --config="configs/$1.py" --methods="$2" "${common[@]}" --seconds=1 \
    --json="$out/${name}_$1.json" ${extra[@]+"${extra[@]}"}
}

fields=() # of EXTRA: the flags of the other program are not those of this one
for flag in ${extra[@]+"${extra[@]}"}; do
  if [[ $flag == --config.* ]]; then fields+=("$flag"); fi
done
memory() { # CONFIG METHODS SECONDS
  part "memory of $1" "$3" "$python" -m mimicnorm_jax.tools.memory --target="$target" \
    --config="configs/$1.py" --methods="$2" "${common[@]}" \
    --json="$out/memory_$1.json" ${fields[@]+"${fields[@]}"}
}

if [ "$target" = gpu ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv || true
fi
part versions 60 "$python" - <<'PY' || code=1
import importlib.metadata
import platform

import jax

print("Python", platform.python_version())
for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is missing")
print("JAX sees", ", ".join(f"{d.device_kind}" for d in jax.devices()))
try:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print("PyTorch sees", ", ".join(gpus) or "no GPU")
    print("cuDNN of PyTorch", torch.backends.cudnn.version())
except ImportError:
    pass
PY

left() { echo "$((limit - SECONDS - 5))"; }
most=$((limit / 4)) # of a part, so that one that hangs leaves time to the others
step imagenet_resnet50 "$ours,$int8" "$most" || code=1
step cifar100_resnet18 "$ours" "$most" || code=1
step cifar100_vgg16 "$ours" "$most" || code=1
# peaks, not times: so these can go on side by side, with programs that are compiled already
parts=() time=$(left)
memory cifar100_resnet18 "$ours" "$time" >"$scratch/resnet18" 2>&1 & parts+=($!)
memory cifar100_vgg16 "$ours" "$time" >"$scratch/vgg16" 2>&1 & parts+=($!)
memory imagenet_resnet50 "$ours,$int8" "$time" >"$scratch/resnet50" 2>&1 & parts+=($!)
for process in "${parts[@]}"; do wait "$process" || code=1; done
cat "$scratch"/resnet18 "$scratch"/vgg16 "$scratch"/resnet50
# Last, since its compiler takes the longest (a minute a step of ResNet-50); batchnorm is what
# relates these rows to the others.
if [ "${TORCH:-yes}" != no ]; then
  for config in imagenet_resnet50 cifar100_resnet18 cifar100_vgg16; do
    step "$config" batchnorm,torch:batchnorm,torch:nonorm "$(left)" torch || code=1
  done
fi
echo "$SECONDS s in all; numbers: $out"
exit "$code"
