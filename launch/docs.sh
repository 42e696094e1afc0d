#!/usr/bin/env bash
# Builds the documentation into site/; a broken link, anchor or name is an error.
# Arguments go to sphinx-build, such as -E to read all pages again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install docs
"$VENV/bin/python" -m sphinx --conf-dir docs --fail-on-warning --keep-going --quiet "$@" . site
echo "the site: site/index.html"
