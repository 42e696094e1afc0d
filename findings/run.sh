#!/usr/bin/env bash
# Runs the findings: all, or those that are named. A line each; exit code 1 if any failed.
#   bash findings/run.sh [NAME…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
all=()
for script in *.sh; do
  [ "$script" = run.sh ] || all+=("${script%.sh}")
done
for name in "$@"; do
  if [ "$name" = run ] || [ "$name" != "${name##*/}" ] || [ ! -f "$name.sh" ]; then
    echo "error: unknown finding '$name'; there are: ${all[*]:-none}" >&2
    exit 2
  fi
done
[ $# -gt 0 ] || set -- ${all[@]+"${all[@]}"}
if [ $# -eq 0 ]; then
  echo "there are no findings yet"
  exit 0
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
code=0
for name in "$@"; do
  if bash "$name.sh" >"$log" 2>&1 </dev/null; then
    echo "pass $name"
  else
    echo "fail $name"
    sed 's/^/  /' "$log"
    code=1
  fi
done
exit "$code"
