"""What other engines make of exported folders: the tokens and logits of transformers.

No part of the default suite, as each engine needs an environment of its own, which is kept in
``~/.cache/megatron-tst/engines``: ``make test-engines``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.models import MODELS, ROOT, TEXT, save_exports

SCRIPT = Path(__file__).parent / "scripts/run.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-tst/engines"
PACKAGES = {
    "transformers4": "transformers==4.57.6",
    "ctranslate2": "ctranslate2==4.8.5 transformers==5.23.0",
    "mlx": "mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2",
    "openvino": "optimum-intel==2.2.0 openvino==2026.4.1 datasets==4.4.2",
    "onnxruntime_genai": "onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2",
    "llama_cpp": "xllamacpp==2026.10.11549",
    "torchtitan": "torchtitan==0.3.0",
    "mbridge": "mbridge==0.15.1 einops==0.8.2",
}
"""What an environment holds besides the packages of this project, which it sees as well."""
WITH_SOURCES = {"llama_cpp"}
"""Engines of which files are needed that are in the sources only: llama.cpp's converter."""
CANNOT = {
    ("ctranslate2", "qwen3moe-bpe"): "No conversion is registered",
    ("onnxruntime_genai", "qwen3moe-bpe"): "NotImplementedError",
}
"""Models that an engine does not know, and what it says."""
# fp32 in another order; logits are of order 10, with an epsilon of 1e-6.
TOLERANCE = 1e-4
BRIDGE = "mbridge"
"""Gives weights and no tokens."""


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    save_exports(folder)
    return folder


def environment_of(engine: str) -> Path:
    """The interpreter of an engine, which is installed where it is not there yet."""
    folder = CACHE / engine.replace("_", "-")
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        # Behind its own packages, so that torch is not installed once more.
        host = Path(sysconfig.get_paths()["purelib"])
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "host.pth").write_text(f"{host}\n")
        command = [str(python), "-m", "pip", "install", "--quiet"]
        # One by one: what the last asks for counts where two disagree.
        for package in PACKAGES[engine].split():
            subprocess.run([*command, package], check=True, timeout=900)
            if engine in WITH_SOURCES:
                _unpack_sources(python, package, folder / "sources")
        (folder / "complete").touch()
    return python


def _unpack_sources(python: Path, package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloaded:
        command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", package]
        # Of this package alone: of what its build needs there are wheels.
        command += ["--no-binary", package.split("==")[0], "--dest", downloaded]
        subprocess.run(command, check=True, timeout=900)
        [archive] = Path(downloaded).iterdir()
        shutil.unpack_archive(archive, folder, filter="data")


# The first test of an engine installs it.
pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Case:
    """What transformers made of an export, and what an engine is to make of it."""

    expected: dict[str, Any]
    done: subprocess.CompletedProcess[str]
    result: Path

    def found(self) -> dict[str, Any]:
        assert self.done.returncode == 0, self.done.stderr
        found: dict[str, Any] = json.loads(self.result.read_text())
        return found


def run(engine: str, exports: Path, model: str, folder: Path) -> Case:
    expected: dict[str, Any] = torch.load(exports / f"{model}-expected.pt", weights_only=True)
    case, result = folder / "case.json", folder / "result.json"
    case.write_text(json.dumps({"text": TEXT, **expected}))
    arguments = [SCRIPT, engine, exports / model, folder / "work", case, result]
    command = [str(environment_of(engine)), "-W", "ignore", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return Case(expected, done, result)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", [engine for engine in PACKAGES if engine != BRIDGE])
def test_an_engine_gives_what_transformers_gives(
    exports: Path, tmp_path: Path, engine: str, model: str
) -> None:
    case = run(engine, exports, model, tmp_path)
    if (engine, model) in CANNOT:
        assert CANNOT[engine, model] in case.done.stderr
        return
    expected, found = case.expected, case.found()
    assert found["ids"] == expected["ids"]
    assert found["tokens"] == expected["tokens"]
    if "logits" in found:
        assert np.abs(np.subtract(found["logits"], expected["logits"])).max() <= TOLERANCE
    # By position, where an engine has nothing else.
    logprobs = torch.tensor(expected["logits"]).log_softmax(-1).numpy()
    for position, values in found.get("logprobs", {}).items():
        assert np.abs(values - logprobs[int(position)]).max() <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_a_bridge_reads_and_writes_the_same_bits(exports: Path, tmp_path: Path, model: str) -> None:
    assert run(BRIDGE, exports, model, tmp_path).found()["weights"] > 0
