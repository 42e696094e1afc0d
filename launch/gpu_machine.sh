# Sourced by the scripts that measure on one NVIDIA GPU: checks the machine, makes what WHEELS holds
# importable, and gives them `part`. It sets python, target, extra and scratch, a folder that is
# removed at the end.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python} target=${TARGET:-gpu}
# shellcheck disable=SC2034 # for the scripts
read -ra extra <<<"${EXTRA:-}"
if [ "$target" = gpu ] && ! nvidia-smi >/dev/null 2>&1; then
  echo "error: no NVIDIA GPU is found here; TARGET=cpu tries the script without one" >&2
  exit 1
fi
command -v "$python" >/dev/null || { echo "error: PYTHON=$python is not found" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$scratch/packages:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # else nothing of the card is left for PyTorch
# in which the parts find each other's programs, and no program of an earlier day
export PROGRAMS="${PROGRAMS:-$scratch/programs}"
export JAX_COMPILATION_CACHE_DIR="$PROGRAMS" XDG_CACHE_HOME="$scratch/cache"
if [ "$target" = cpu ]; then
  export JAX_PLATFORMS=cpu
else
  export JAX_PLATFORMS=cuda,cpu # and no silent change to the CPU
fi
if [ "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --target "$scratch/packages" "$WHEELS"/*.whl
fi

if ! missing=$("$python" -c 'import pytest
import mimicnorm_jax.tools.campaign.runs, mimicnorm_jax.tools.memory.compiled' 2>&1); then
  echo "error: PYTHON=$python cannot run this: ${missing##*$'\n'}" >&2
  exit 1
fi

# part NAME SECONDS COMMAND...: runs it within its time and says how it went
part() {
  local name=$1 seconds=$2 began=$SECONDS status=0
  shift 2
  # timeout leaves the group that Ctrl-C reaches; set here, it also holds in the background
  trap 'kill $(jobs -p) 2>/dev/null || true; exit 130' INT TERM
  timeout --kill-after=5 "$((seconds > 0 ? seconds : 1))" "$@" <&0 &
  wait "$!" || status=$?
  case $status in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: FAILED: not done in $seconds s" ;;
    *) echo "$name: FAILED with exit code $status" ;;
  esac
  return "$status"
}
