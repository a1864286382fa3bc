"""Runs an exported folder in one engine, in the virtual environment of that engine.

run.py ENGINE FOLDER WORK CASE RESULT: ``CASE`` has a ``text`` and what transformers made of it:
``ids``, the greedy ``tokens`` after them, and ``logits`` of all of these. The result has the same
from the engine, as far as it gives them.
"""

import importlib
import json
import sys
from pathlib import Path

engine, *paths = sys.argv[1:]
folder, work, case, result = map(Path, paths)
work.mkdir(parents=True, exist_ok=True)
module = importlib.import_module(f"run_{engine}")
found = module.run(folder, work, json.loads(case.read_text()))
result.write_text(json.dumps(found))
