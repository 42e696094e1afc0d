#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine: one process, all of them.
#   bash launch/gpu.sh --config configs/imagenet_resnet50.py --config.data.dir=DIR
# CUDA_VISIBLE_DEVICES chooses some of them.
set -euo pipefail
command -v nvidia-smi >/dev/null || { echo "error: no NVIDIA driver is found here" >&2; exit 1; }
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install cuda
exec "$VENV/bin/python" -m mimicnorm_jax.main "$@"
