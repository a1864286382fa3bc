#!/usr/bin/env bash
# Prints the command of a Python that can build the environment, preferring the tested version:
#
#   find_python.sh [VERSION...]
#
# Candidates are run, not merely looked up: a pyenv shim named python3.12 exists on PATH even where
# it can only fail, and a distribution's Python may lack the venv module.
set -euo pipefail
shopt -s nullglob

# megatron-core 0.19.2 has wheels for no others.
(($#)) || set -- 3.12 3.13
readonly versions=("$@")
wanted=$(printf " or %s" "$@")
readonly wanted=${wanted# or }

# works COMMAND VERSION: whether COMMAND runs a Python of VERSION that can create virtual environments.
works() {
  local version
  version=$("$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  [[ $version == "$2" ]]
}

if [[ -n ${PYTHON:-} ]]; then
  for version in "${versions[@]}"; do
    if works "$PYTHON" "$version"; then
      echo "$PYTHON"
      exit
    fi
  done
  echo "PYTHON is '$PYTHON', which does not run as Python $wanted with the venv module:" \
    "correct it, or unset it to have the machine searched." >&2
  exit 1
fi

pyenv_versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
uv_versions=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}

for version in "${versions[@]}"; do
  for candidate in \
    "python$version" \
    python3 \
    python \
    "$pyenv_versions/$version"*/bin/python \
    "$uv_versions/cpython-$version"*/bin/python3; do
    if works "$candidate" "$version"; then
      echo "$candidate"
      exit
    fi
  done
done

echo "\
No working Python $wanted was found (tried PATH, pyenv and uv). Install one, for example with
  Debian/Ubuntu  apt-get install python3.12 python3.12-venv
  pyenv          pyenv install 3.12
  uv             uv python install 3.12
  conda          conda create -n tst python=3.12 && conda activate tst
or name one: make setup PYTHON=/path/to/python3.12" >&2
exit 1
