#!/usr/bin/env bash
# Measures on one NVIDIA GPU, within LIMIT seconds (default 480, so 8 minutes) and without a network:
#   smoke      this machine's software computes what it should: tests, and a step against a CPU's
#   benchmark  speed and memory of the step, also in PyTorch: gpu_benchmark.sh
#   training   as many and as long runs as end in time, on the archives in the folder DATA
#   DATA=DIR WHEELS=DIR OUT=DIR bash launch/gpu_campaign.sh
# What is in OUT, at any time: numbers.tar (of the parts and epochs that are done) and campaign.log.
# A part that fails does not stop the others, but makes the exit code 1. PARTS chooses some of them.
# What PYTHON (default python) lacks comes as wheels in the folder WHEELS. Where there is a network,
#   DATA=DIR WHEELS=DIR bash launch/gpu_campaign.sh --pack
# fills that folder, and says how large everything is. To try it without a GPU: TARGET=cpu, with
# BATCH, EXTRA, TORCH (of gpu_benchmark.sh), TESTS (of pytest) and TRAINING (flags of
# mimicnorm_jax.tools.campaign train).
set -euo pipefail
SECONDS=0
limit=${LIMIT:-480} most=$((60 * 2**20))
archives=(imagenet200_32.tar.xz cifar10_jpeg.tar.xz)
# imported by what runs here, and in no image with JAX, Flax, PyTorch and scikit-learn seen so far
packages=(clu ml_collections tensorboardX grain simplejpeg)
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

refuse() {
  echo "error: $1" >&2
  exit 2
}
parts=" ${PARTS:-smoke benchmark training} "
for name in $parts; do
  [[ " smoke benchmark training " == *" $name "* ]] ||
    refuse "PARTS names $name; allowed: smoke, benchmark, training"
done
wants() { [[ $parts == *" $1 "* ]]; }
[[ $limit =~ ^[1-9][0-9]*$ ]] || refuse "LIMIT=$limit is not a number of seconds"
if wants training; then
  for archive in "${archives[@]}"; do
    [ -f "${DATA:-}/$archive" ] || refuse "DATA=${DATA:-} has no $archive"
  done
fi

if [ "${1:-}" = --pack ]; then
  [ "${WHEELS:-}" ] || refuse "WHEELS is not set: the folder for the wheels"
  platforms=()
  for version in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  "${PYTHON:-python}" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --implementation cp --python-version 3.12 "${platforms[@]}" \
    --platform manylinux2014_x86_64 --constraint "$folder/constraints.txt" \
    --dest "$WHEELS" "${packages[@]}"
elif [ $# -gt 0 ]; then
  refuse "$1 is not known; allowed: --pack"
fi

# bytes of the files named on standard input, each followed by a zero byte
bytes() { { xargs -0 -r stat -L -c %s -- 2>/dev/null || true; } | awk '{ sum += $1 } END { print sum + 0 }'; }
tree=$(cd "$folder" && { git ls-files -z 2>/dev/null ||
  find . -type f -not -path './.*' -print0; } | bytes)
data=0 wheels=0
if wants training; then data=$(printf '%s\0' "${archives[@]/#/${DATA}/}" | bytes); fi
if [ "${WHEELS:-}" ]; then
  compgen -G "$WHEELS/*.whl" >/dev/null || refuse "WHEELS=$WHEELS has no wheels"
  wheels=$(find "$WHEELS" -name '*.whl' -print0 | bytes)
fi
sum=$((tree + data + wheels))
sizes="tree $tree, data $data, wheels $wheels bytes: $((sum / 2**20)) of $((most / 2**20)) MiB"
[ "$sum" -le "$most" ] || refuse "too large to travel: $sizes"
if [ "${1:-}" = --pack ]; then
  echo "$sizes"
  exit
fi

[ "${OUT:-}" ] || refuse "OUT is not set: the folder for numbers.tar and campaign.log"
mkdir -p "$OUT"
out=$(cd "$OUT" && pwd)
if [ "${DATA:-}" ]; then DATA=$(cd "$DATA" && pwd); fi
if [ "${WHEELS:-}" ]; then WHEELS=$(cd "$WHEELS" && pwd); fi
source "$(dirname "${BASH_SOURCE[0]}")/gpu_machine.sh"
unset WHEELS # gpu_benchmark.sh finds what they hold
numbers=$scratch/numbers
mkdir -p "$numbers/smoke" "$numbers/benchmark" "$numbers/training" "$scratch/data/cifar10"
exec > >(tee "$out/campaign.log") 2>&1
echo "$sizes"

pack() { # whoever reads it never finds half a tar; a file that changes meanwhile comes again
  local draft="$out/.numbers.$BASHPID"
  tar -cf "$draft" -C "$scratch" numbers 2>/dev/null || true
  mv -f "$draft" "$out/numbers.tar"
}
# so that a kill at any moment leaves what was measured
while sleep 5; do pack; done >/dev/null 2>&1 & # which must not keep the log open
packing=$!
trap 'kill "$packing" 2>/dev/null || true; pack; rm -rf "$scratch"' EXIT

unpack() {
  # Python's own reader where the machine has no xz
  local archive=$1 where=$2
  tar -xJf "$DATA/$archive" -C "$where" 2>/dev/null ||
    "$python" -m tarfile -e "$DATA/$archive" "$where"
}
unpacking=()
if wants training; then # beside the tests, which leave cores to it
  unpack cifar10_jpeg.tar.xz "$scratch/data/cifar10" & unpacking+=($!)
  unpack imagenet200_32.tar.xz "$scratch/data" & unpacking+=($!)
fi

code=0 recipe=configs/cifar10_folder_resnet20.py
fields=() # of EXTRA
for flag in ${extra[@]+"${extra[@]}"}; do
  if [[ $flag == --config.* ]]; then fields+=("$flag"); fi
done
if wants smoke; then
  each=$((limit * 8 / 100)) # seconds
  part "5 steps in bfloat16" "$each" "$python" -m mimicnorm_jax.main \
    --config=configs/digits_resnet20.py --config.precision=bfloat16 --config.max_steps=5 \
    --workdir="$scratch/run" || code=1
  cp "$scratch/run/summary.json" "$numbers/smoke/" 2>/dev/null || true
  part "a finite evaluation of them" "$each" "$python" -c 'import json, math, sys
loss = json.load(open(sys.argv[1]))["final_test_loss"]
sys.exit(0 if math.isfinite(loss) else f"error: final_test_loss is {loss}")' \
    "$numbers/smoke/summary.json" || code=1
  part "agreement of a float32 step with the CPU's" "$((2 * each))" \
    "$python" -m mimicnorm_jax.tools.campaign agreement --config="$recipe" \
    --config.batch_size=64 --numbers="$numbers/smoke" ${fields[@]+"${fields[@]}"} || code=1
  # On the CPU (tests/conftest.py): they are about the software, the step above about the GPU.
  read -ra tests <<<"${TESTS:-tests/layers tests/train/test_step.py}"
  # Without the plugins that the machine has beside ours, whose warnings would be errors.
  part tests "$((2 * each))" env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
    "$python" -m pytest -q -p xdist -p no:cacheprovider -n "$(nproc)" \
    --junitxml="$numbers/smoke/tests.xml" "${tests[@]}" || code=1
fi
for process in ${unpacking[@]+"${unpacking[@]}"}; do # before anything is timed
  wait "$process" || { echo "an archive cannot be unpacked"; code=1; }
done
if wants benchmark; then
  left=$((limit - SECONDS - 10))
  if wants training; then left=$((left / 2)); fi
  part benchmark "$left" env OUT="$numbers/benchmark" LIMIT="$((left > 10 ? left - 5 : 5))" \
    bash launch/gpu_benchmark.sh || code=1
fi
if wants training; then
  left=$((limit - SECONDS - 10))
  read -ra flags <<<"${TRAINING:-}"
  part training "$left" "$python" -m mimicnorm_jax.tools.campaign train --config="$recipe" \
    --data="$scratch/data" --numbers="$numbers/training" --limit="$((left > 15 ? left - 10 : 5))" \
    ${fields[@]+"${fields[@]}"} ${flags[@]+"${flags[@]}"} || code=1
fi
echo "$SECONDS s in all; numbers.tar: $(find "$numbers" -type f | wc -l) files"
exit "$code"
