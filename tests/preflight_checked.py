"""Runs many launches and measurements through one process, and hands out what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.preflight.launch_command import read_launch

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "examples/pretrain"
MODELS = ("270m", "600m", "3b", "10b_a1b")
VARIANTS = ("baseline", "tst")


class Checked:
    """Reports of launches, by name; with the Transformer Engine of ``make setup-te`` on request."""

    def __init__(self, folder: Path, with_engine: bool = False) -> None:
        self.folder = folder
        self.with_engine = with_engine
        self._launches: dict[str, dict[str, Any]] = {}
        self._measurements: dict[str, tuple[str, list[Any]]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, Any] = {}

    def script(self, model: str, **variables: str) -> list[str]:
        # A number of layers can be changed behind the script; MODEL=hybrid has a pattern of them.
        paths = {"DATA_PATH": "/absent/corpus", "TOKENIZER": "/absent", "OUTPUT_DIR": "/absent/run"}
        paths["MODEL"] = "gpt"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (paths | variables).items():
                patch.setenv(name, value)
            return read_launch(PRETRAIN / f"pretrain_gpt_{model}.sh").arguments

    def add(self, name: str, argv: list[str], size: int = 64, **more: Any) -> None:
        self._launches[name] = {"argv": argv, "world_size": size, "gpu_bytes": 192e9} | more

    def measure(self, name: str, function: str, *arguments: Any) -> None:
        self._measurements[name] = (function, list(arguments))

    def run(self) -> None:
        cases, results = self.folder / "cases.json", self.folder / "results.json"
        asked = {
            "launches": list(self._launches.values()),
            "measured": list(self._measurements.values()),
            "with_engine": self.with_engine,
        }
        cases.write_text(json.dumps(asked))
        subprocess.run(
            [sys.executable, "-m", "tests.preflight_cases", str(cases), str(results)],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.DEVNULL,
        )
        answers = json.loads(results.read_text())
        self.found = dict(zip(self._launches, answers["launches"], strict=True))
        self.measured = dict(zip(self._measurements, answers["measured"], strict=True))

    def texts(self, name: str, level: str) -> list[str]:
        return [f["text"] for f in self.found[name]["findings"] if f["level"] == level]
