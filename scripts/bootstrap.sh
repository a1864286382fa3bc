#!/usr/bin/env bash
# Creates or refreshes .venv with the project, its pinned dependencies and the development tools.
#
# A stamp written after a complete installation names what was installed, so that a second call
# returns at once and a changed pin installs again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly python=$venv/bin/python
readonly stamp=$venv/installed

say() { echo "setup: $*"; }

# The location counts too: a copied tree holds an installation that points at the original.
wanted=$({ pwd -P && cat pyproject.toml constraints.txt; } | sha256sum)

if "$python" -c '' 2>/dev/null; then
  [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]] || exit 0
else
  rm -f "$stamp"
fi

if [[ -e $stamp ]]; then
  say "pyproject.toml, constraints.txt or the location has changed: updating $venv"
  # Matches nothing from here on, so that an interrupted update is taken up again.
  echo incomplete >"$stamp"
else
  base=$(scripts/find_python.sh)
  say "creating $venv with $("$base" --version) ($base)"
  "$base" -m venv --clear "$venv"
  say "installing torch, megatron-core and the rest of constraints.txt:" \
    "about 6 GB on disk, several minutes the first time"
fi

started=$SECONDS
# Of pip's account only the large files and the errors are of interest.
"$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
  --constraint constraints.txt --editable '.[dev]' 2> >(sed '/^WARNING: /d' >&2) |
  sed --unbuffered --quiet --regexp-extended \
    -e 's/^ *(Downloading|Using cached) ([^ -]+)-[^ ]* \(([0-9]{3,}\.[0-9] MB)\)/setup:   \1 \2 (\3)/p' \
    -e 's/^Installing collected packages.*/setup:   unpacking/p'

echo "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "$venv is ready after $((SECONDS - started)) s"
