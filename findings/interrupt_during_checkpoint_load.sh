#!/usr/bin/env bash
# torch 2.14.1 with Python 3.13.0: Ctrl-C while a distributed checkpoint is read may come as a SystemError.
#
# Behaviour: torch.load of a part of a file meets the signal in C code, which goes on and calls the
# method tell() of the file with KeyboardInterrupt set. Python makes a SystemError of it, whose
# cause is the KeyboardInterrupt. With Python 3.12.1 and the same torch it stays what it is.
# Expected: KeyboardInterrupt, or torch's CheckpointException around it.
# Seen: CheckpointException around SystemError "<method 'tell' of '_io.FileIO' objects> returned a
#   result with an exception set", in about one of ten interrupts. A reader that takes errors for
#   damage says that the checkpoint is damaged.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON (3.13) skips the installation; no GPU is
# needed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python=${FINDINGS_PYTHON:-}
if [[ -z $python ]]; then
  for base in python3.13 python3 ~/.pyenv/versions/3.13*/bin/python; do
    "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && break
  done
  "$base" -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5
fi

cat >"$folder/finding.py" <<'PYTHON'
import logging
import platform
import random
import signal
import sys
from collections import Counter

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

# torch logs a traceback for each.
logging.disable(logging.CRITICAL)
print("Python", platform.python_version(), "torch", torch.__version__)
assert torch.__version__.startswith("2.14.1")
folder = sys.argv[1]
state = {str(number): torch.ones(8) for number in range(500)}
dcp.save(state, checkpoint_id=folder, no_dist=True)
signal.signal(signal.SIGALRM, signal.default_int_handler)
random.seed(0)
seen = Counter()
for _ in range(200):
    try:
        # In the middle of a load, as a key is pressed.
        signal.setitimer(signal.ITIMER_REAL, 0.05 + 0.1 * random.random())
        while True:
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except KeyboardInterrupt:
        seen["KeyboardInterrupt"] += 1
    except CheckpointException as made:
        for error, _ in made.failures.values():
            seen[f"{error!r}, caused by {error.__cause__!r}"] += 1
for kind, count in seen.most_common():
    print(count, kind)
raise SystemExit(not any(kind.startswith("SystemError") for kind in seen))
PYTHON
"$python" -W ignore "$folder/finding.py" "$folder/checkpoint"
