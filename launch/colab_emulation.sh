#!/usr/bin/env bash
# What the first cell of the notebook does to Colab's packages (launch/colab_packages.txt), and whether this project
# then works there, as far as that can be seen without an accelerator. Takes about ten minutes and 5 GB for a while.
#
#   PYTHON=python3.12 bash launch/colab_emulation.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
python=$folder/venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

pip wheel --quiet --no-deps --wheel-dir "$folder" .
wheel=$(echo "$folder"/*.whl)
pip install --quiet --requirement launch/colab_packages.txt
pip freeze >"$folder/before"
echo "== pip check before"
pip check | tee "$folder/check_before" || true

echo "== what 'pip install $(basename "$wheel")' alone would do (which is what not to do)"
pip install --quiet --dry-run --report "$folder/alone.json" "$wheel"
"$python" - "$folder/alone.json" "$folder/before" <<'PY'
import json
import sys

report, before = sys.argv[1:]
had = dict(line.split("==") for line in open(before).read().splitlines() if "==" in line)
for entry in json.load(open(report))["install"]:
    name, version = entry["metadata"]["name"], entry["metadata"]["version"]
    if name in had:
        print(f"{name} {had[name]} -> {version}")
PY

echo "== the notebook's cell"
"$python" - "$wheel" >"$folder/wanted" <<'PY'
import json
import sys

cells = json.load(open("launch/colab.ipynb"))["cells"]
(cell,) = (cell for cell in cells if "install" in cell["metadata"].get("tags", ()))
*lines, command = "".join(cell["source"]).splitlines()
assert command.startswith("%pip install"), command
names = {}
exec("\n".join(lines), names)
print(sys.argv[1], *names["wanted"], sep="\n")
PY
cat "$folder/wanted"
mapfile -t wanted <"$folder/wanted"
pip install --quiet "${wanted[@]}"
pip freeze >"$folder/after"
echo "== packages that changed"
diff "$folder/before" "$folder/after" | grep '^[<>]' | grep -vi mimicnorm | sort -k2 ||
  true
echo "== pip check after"
pip check | tee "$folder/check_after" || true
diff "$folder/check_before" "$folder/check_after" >/dev/null || {
  echo "pip check says something else than before" >&2
  exit 1
}

echo "== a run, on the CPU"
cd "$folder"
"$python" - <<'PY'
import jax
import numba
import numpy as np
import tensorflow as tf

import mimicnorm_jax

print("JAX", jax.__version__, jax.devices(), "numba", numba.njit(lambda x: x + 1)(np.ones(2)))
print("TensorFlow", tf.__version__, tf.reduce_sum(tf.ones(3)).numpy())
summary = mimicnorm_jax.fit("digits_resnet20", "run", overrides={"max_steps": 40})
assert summary["final_test_accuracy_recalibrated"] > 0.8, summary
network = mimicnorm_jax.load("run")
print("classes", *network.classes)
PY
