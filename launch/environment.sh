# Sourced by the other scripts: a virtual environment with this project in it.
# Set PYTHON to choose the interpreter, which then has an environment of its own (.venv-3.12);
# VENV to choose where the environment goes. From Python 3.12 on the newest JAX is installed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
  return 1
}

if [ -z "${VENV:-}" ]; then
  VENV=.venv
  if [ -n "${PYTHON:-}" ]; then
    python=$(find_python) || exit 1
    VENV=.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  fi
fi

# install [EXTRA]: installs the project with the versions of constraints.txt, unless that
# has been done since pyproject.toml and constraints.txt last changed.
install() {
  local extra=${1:-} python stamp
  stamp="$VENV/.installed-${extra:-core}-$(cat pyproject.toml setup.py constraints.txt | cksum | tr ' ' '-')"
  [ -e "$stamp" ] && return
  python=$(find_python) || return
  echo "installing into $VENV (a few minutes the first time) …"
  # without pip where an earlier attempt was cut off, or where venv itself failed
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
      echo "error: VENV=$VENV is not empty and no virtual environment" >&2
      return 1
    fi
    "$python" -m venv --clear "$VENV" || return
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extra:+[$extra]}" || return
  touch "$stamp"
}
