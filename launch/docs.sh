#!/usr/bin/env bash
# Builds the documentation into site/; a broken link, anchor or name is an error.
# Arguments go to sphinx-build. All pages are read each time: what is left as it was warns of nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install docs
"$VENV/bin/python" -m sphinx --conf-dir docs --fail-on-warning --keep-going --fresh-env \
  --write-all --quiet "$@" . site
echo "the site: site/index.html"
