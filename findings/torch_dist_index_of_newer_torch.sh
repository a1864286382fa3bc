#!/usr/bin/env bash
# torch 2.15.0 and 2.14.1: a distributed checkpoint of the newer torch cannot be read by the older.
#
# Behaviour: torch.distributed.checkpoint pickles the properties of a tensor as a tuple into the
# file .metadata. In 2.15.0 the tuple has one value more, the strides. 2.14.1 fails over it while
# it reads the index, before any tensor, with a message that says nothing of versions. The other
# way round works.
# Expected: an error that names the version, or the new value left out.
# Seen: ValueError "too many values to unpack (expected 5)" in CheckpointException. A training
#   run that was moved to 2.15.0 and saved cannot go back to 2.14.1.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON (with torch 2.14.1) and FINDINGS_NEW_PYTHON
# (with torch 2.15.0) skip the installations; no GPU is needed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

with_torch() { # version, python that may have it already
  if [[ -n $2 ]]; then
    echo "$2"
    return
  fi
  for base in python3.12 python3 ~/.pyenv/versions/3.12*/bin/python; do
    "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break
  done
  "$base" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet "torch==$1" numpy==2.5.5 >&2
  echo "$folder/$1/bin/python"
}
old=$(with_torch 2.14.1 "${FINDINGS_PYTHON:-}")
new=$(with_torch 2.15.0 "${FINDINGS_NEW_PYTHON:-}")

cat >"$folder/finding.py" <<'PYTHON'
import sys

import torch
from torch.distributed import checkpoint

action, version, path = sys.argv[1:]
assert torch.__version__.split("+")[0] == version, torch.__version__
weight = torch.arange(6.0).view(2, 3)
if action == "save":
    checkpoint.save({"weight": weight}, checkpoint_id=path, no_dist=True)
    sys.exit()
state = {"weight": torch.zeros(2, 3)}
try:
    checkpoint.load(state, checkpoint_id=path, no_dist=True)
# CheckpointException is no Exception.
except BaseException as error:
    seen = [line.strip() for line in str(error).splitlines() if "too many values" in line]
    print(f"torch {version} fails: {type(error).__name__}: ... {seen}")
    sys.exit(not seen)
assert torch.equal(state["weight"], weight)
print(f"torch {version} reads it")
sys.exit(3)
PYTHON

run() { "$1" -W ignore "$folder/finding.py" "${@:2}"; }
run "$new" save 2.15.0 "$folder/of-2.15.0" 2>/dev/null
run "$old" save 2.14.1 "$folder/of-2.14.1" 2>/dev/null
run "$new" load 2.15.0 "$folder/of-2.14.1" 2>/dev/null && exit 1
[[ $? == 3 ]]
run "$old" load 2.14.1 "$folder/of-2.15.0" 2>/dev/null
