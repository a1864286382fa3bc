#!/usr/bin/env bash
# Installs torchtitan for examples/torchtitan and its test.
#
# It goes into a folder of its own in .venv, without what it asks for beside: an older datasets than
# constraints.txt has, which it needs for texts of Hugging Face alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly folder=${1:-.venv/torchtitan}
readonly packages=(
  torchtitan==0.3.0 docstring_parser==0.18.0 einops==0.8.2 spmd_types==0.2.3
  torch_checkpointing==0.1.1 torchdata==0.11.0 typeguard==4.6.1 tyro==1.0.17
)

[[ $(cat "$folder/installed" 2>/dev/null) != "${packages[*]}" ]] || exit 0
rm -rf "$folder"
echo "setup-torchtitan: installing ${packages[0]} into $folder"
.venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off --quiet \
  --no-deps --target "$folder" "${packages[@]}" 2> >(sed '/^WARNING: /d' >&2)
echo "${packages[*]}" >"$folder/installed"
