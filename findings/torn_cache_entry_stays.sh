#!/usr/bin/env bash
# jax 0.10.1, jaxlib 0.10.1, numpy 2.4.2
#
# Source: JAX_COMPILATION_CACHE_DIR keeps compiled programs from one start to the next. An entry that cannot be read is a
# warning, and the program is compiled again; one expects the new one to take the old one's place.
#
# Behaviour: it does not. An entry is written into its place, not beside it and renamed, so a process that is killed (or
# a disk that is full) at that moment leaves a part of one; and nothing is written where a file exists. So every later
# start warns and compiles, until somebody deletes the file.
#
# Output seen:
#   start 1: compiled, no warning; start 2: read, no warning
#   with half of the entry: start 3: compiled, a warning; start 4: compiled, a warning; the entry is as it was
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.1 jaxlib==0.10.1 numpy==2.4.2
cat >"$folder/start.py" <<'PY'
import warnings

import jax
import jax.numpy as jnp

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).block_until_ready()
compiled = hits.count("/jax/compilation_cache/cache_misses") > 0
warned = any("Error reading persistent compilation cache entry for 'jit__lambda'" in str(w.message) for w in caught)
print("compiled" if compiled else "read", "a warning" if warned else "no warning", sep=", ")
PY
start() {
  JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 JAX_COMPILATION_CACHE_DIR=$folder/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    "$folder/venv/bin/python" "$folder/start.py"
}
one=$(start) two=$(start)
echo "start 1: $one; start 2: $two"
[ "$one" = "compiled, no warning" ] && [ "$two" = "read, no warning" ]
entry=$(ls "$folder"/cache/jit__lambda-*-cache)
size=$(stat -c %s "$entry")
truncate -s $((size / 2)) "$entry"
before=$(sha256sum <"$entry")
three=$(start) four=$(start)
echo "with half of the entry: start 3: $three; start 4: $four"
[ "$three" = "compiled, a warning" ] && [ "$four" = "compiled, a warning" ]
[ "$(sha256sum <"$entry")" = "$before" ]
