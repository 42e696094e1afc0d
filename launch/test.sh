#!/usr/bin/env bash
# Installs the project and runs the linter, the type checker and the tests.
# Arguments go to pytest, such as tests/layers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install dev,prepare
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" "$@"
