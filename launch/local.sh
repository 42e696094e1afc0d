#!/usr/bin/env bash
# Trains in N processes on this machine, as on N machines: to try it without a cluster.
#   bash launch/local.sh N [arguments of mimicnorm_jax.main]
# DEVICES is the number of CPU devices of each process (default 1). What process i prints begins
# with [i]. Ctrl-C stops all at the same step; the exit code is the first that is not 0.
set -euo pipefail
whole_number() { # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] && return
  echo "error: $1=$2 is no whole number from 1 to 9999, so nothing was run;" \
    "usage: bash launch/local.sh N [arguments of mimicnorm_jax.main]" >&2
  exit 2
}
whole_number N "${1:-}"
whole_number DEVICES "${DEVICES:-1}"
count=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install

export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
free_port='import socket; print(socket.create_server(("localhost", 0)).getsockname()[1])'
coordinator="localhost:$("$VENV/bin/python" -c "$free_port")"
label() { # line by line, where sed would wait for more
  local line
  trap '' INT TERM # Ctrl-C is for the processes: what they still say is wanted
  while IFS= read -r line; do printf '[%s] %s\n' "$1" "$line"; done
}
processes=() interrupted='' code=0
trap 'interrupted=yes; kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
  "$VENV/bin/python" -m mimicnorm_jax.main --coordinator="$coordinator" \
    --num-processes="$count" --process-id="$i" "$@" \
    > >(label "$i") 2> >(label "$i" >&2) &
  processes+=($!)
done
for process in "${processes[@]}"; do
  wait "$process" && status=0 || status=$?
  if [ "$interrupted" ]; then # that ended the wait, not the process
    interrupted=''
    wait "$process" && status=0 || status=$?
  fi
  ((code)) || code=$status
done
exit "$code"
