#!/usr/bin/env bash
# Builds an environment on top of .venv in which some packages are others:
#
#   overlay.sh NAME PIP-ARGUMENT...
#
# It lies in .venv/overlays/NAME. What is not installed there comes from .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

(($# >= 2)) || { echo "usage: $0 NAME PIP-ARGUMENT..." >&2; exit 2; }
readonly folder=.venv/overlays/$1
shift

.venv/bin/python -m venv --clear --without-pip "$folder"
site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# A path alone would leave out the editable installation of this project.
echo "import site; site.addsitedir('$(site_packages .venv/bin/python)')" \
  >"$(site_packages "$folder/bin/python")/base.pth"
"$folder/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
  --quiet "$@" 2> >(sed '/^WARNING: /d' >&2)
