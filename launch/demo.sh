#!/usr/bin/env bash
# Installs the project and trains a ResNet-20 with MimicNorm on real handwritten digits.
# Arguments go to the training program, such as --config.method=batchnorm.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install
exec "$VENV/bin/python" -m mimicnorm_jax.main --config configs/digits_resnet20.py "$@"
