#!/usr/bin/env bash
# jax 0.10.1, jaxlib 0.10.1, numpy 2.4.2
#
# Source: processes on CPUs are connected by jax.distributed.initialize(), whose initialization_timeout is 300 s, and
# their collectives go by Gloo. One expects that processes which are connected wait for each other in every collective,
# as those of NCCL do, or that a process that comes 40 s later is too late in every one.
#
# Behaviour: initialize() connects no one's collectives. The first collective does, with 30 s that nothing sets: where one
# process compiles for 40 s longer than another before its first step, the run ends. In the second collective and all
# later ones the same 40 s are waited for.
#
# Output seen:
#   late for the first collective: process 0 JaxRuntimeError Gloo context initialization failed: DEADLINE_EXCEEDED after 30 s
#   late for the second collective: process 0 16.0 after 40 s, process 1 16.0 after 0 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.1 jaxlib==0.10.1 numpy==2.4.2
cat >"$folder/process.py" <<'PY'
import os
import re
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

index, late_for, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
mesh = Mesh(np.array(jax.devices()), ("x",))
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), np.ones(4))


def total(factor):
    return float(jax.jit(lambda x: (factor * x).sum(), out_shardings=NamedSharding(mesh, P()))(x))


if late_for == "second":
    total(1)
if index == 1:
    time.sleep(40)
began = time.monotonic()
try:
    said = total(2)
except Exception as error:
    said = type(error).__name__ + " " + re.search(r"Gloo context initialization failed: [A-Z_]+", str(error)).group()
print(f"process {index} {said} after {time.monotonic() - began:.0f} s", flush=True)
os._exit(0)
PY
port=$("$folder/venv/bin/python" -c 'import socket; print(socket.create_server(("localhost", 0)).getsockname()[1])')
both() {
  local devices=--xla_force_host_platform_device_count=2
  for index in 0 1; do
    # process 1 aborts where process 0, which is its coordinator, is gone
    JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 XLA_FLAGS=$devices timeout 120 \
      "$folder/venv/bin/python" "$folder/process.py" "$index" "$1" "$2" >"$folder/$1.$index" 2>/dev/null &
  done
  wait
}
both first "$port"
both second "$((port + 1))"
said() { grep '^process' "$folder/$1"; } # beside what Gloo says of its peers
echo "late for the first collective: $(said first.0)"
echo "late for the second collective: $(said second.0), $(said second.1)"
grep -q '^process 0 JaxRuntimeError Gloo context initialization failed: DEADLINE_EXCEEDED after 30 s$' "$folder/first.0"
grep -q '^process 0 16.0 after 40 s$' "$folder/second.0"
