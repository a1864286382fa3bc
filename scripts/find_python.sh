#!/usr/bin/env bash
# Prints the command of a Python that can build the environment, preferring the tested version.
#
# Candidates are run, not merely looked up: a pyenv shim named python3.12 exists on PATH even where
# it can only fail, and a distribution's Python may lack the venv module.
set -euo pipefail
shopt -s nullglob

# works COMMAND VERSION: whether COMMAND runs a Python of VERSION (or, for "any", 3.12 and newer)
# that can create virtual environments.
works() {
  local version minor
  version=$("$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  [[ $2 == any ]] || { [[ $version == "$2" ]]; return; }
  minor=${version#3.}
  [[ $version == 3.* && $minor -ge 12 ]]
}

if [[ -n ${PYTHON:-} ]]; then
  if works "$PYTHON" any; then
    echo "$PYTHON"
    exit
  fi
  echo "PYTHON is '$PYTHON', which does not run as Python 3.12 or newer with the venv module:" \
    "correct it, or unset it to have the machine searched." >&2
  exit 1
fi

pyenv_versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
uv_versions=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}

for version in 3.12 3.13 any; do
  for candidate in \
    "python${version/any/}" \
    python3 \
    python \
    "$pyenv_versions"/"${version/any/}"*/bin/python \
    "$uv_versions"/cpython-"${version/any/}"*/bin/python3; do
    if works "$candidate" "$version"; then
      echo "$candidate"
      exit
    fi
  done
done

echo "\
No working Python 3.12 or newer was found (tried PATH, pyenv and uv). Install one, for example with
  Debian/Ubuntu  apt-get install python3.12 python3.12-venv
  pyenv          pyenv install 3.12
  uv             uv python install 3.12
  conda          conda create -n tst python=3.12 && conda activate tst
or name one: make setup PYTHON=/path/to/python3.12" >&2
exit 1
