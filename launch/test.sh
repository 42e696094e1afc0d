#!/usr/bin/env bash
# Installs the project and runs the linter, the type checker and the tests.
# --all adds what takes minutes to hours (CONTRIBUTING.md); other arguments go to pytest, such
# as tests/layers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install dev,prepare
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# Some tests wait more than they compute: it takes three processes to keep two cores busy.
run_tests() { "$VENV/bin/python" -m pytest -n "${TEST_PROCESSES:-3}" "$@"; }
if [ "${1:-}" != --all ]; then
  run_tests "$@"
  exit
fi
shift
failed=0
run_tests "$@" || failed=1
finite=tests/theory/test_finite.py # which computes more than it compiles
run_tests -m long --ignore="$finite" "$@" || failed=1
MIMICNORM_TEST_OPTIMIZED=1 run_tests -m long "$finite" || failed=1
exit "$failed"
