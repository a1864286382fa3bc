"""What other engines make of exported folders: the tokens and logits of transformers.

No part of the default suite, as each engine needs an environment of its own, which is kept in
``~/.cache/megatron-tst/engines``: ``make test-engines``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.models import MODELS, TEXT, save_exports

SCRIPT = Path(__file__).parent / "scripts/run.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-tst/engines"
PACKAGES = {
    "transformers4": "transformers==4.57.6",
    "ctranslate2": "ctranslate2==4.8.5 transformers==5.23.0",
    "mlx": "mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2",
    "openvino": "optimum-intel==2.2.0 openvino==2026.4.1 datasets==4.4.2",
    "onnxruntime_genai": "onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2",
}
"""What an environment holds besides the packages of this project, which it sees as well."""
CANNOT = {
    ("ctranslate2", "qwen3moe-bpe"): "No conversion is registered",
    ("onnxruntime_genai", "qwen3moe-bpe"): "NotImplementedError",
}
"""Models that an engine does not know, and what it says."""
# fp32 in another order; logits are of order 10, with an epsilon of 1e-6.
TOLERANCE = 1e-4


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
        (folder / "complete").touch()
    return python


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", PACKAGES)
def test_an_engine_gives_what_transformers_gives(
    exports: Path, tmp_path: Path, engine: str, model: str
) -> None:
    expected: dict[str, Any] = torch.load(exports / f"{model}-expected.pt", weights_only=True)
    case, result = tmp_path / "case.json", tmp_path / "result.json"
    case.write_text(json.dumps({"text": TEXT, **expected}))
    arguments = [SCRIPT, engine, exports / model, tmp_path / "work", case, result]
    command = [str(environment_of(engine)), "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if (engine, model) in CANNOT:
        assert CANNOT[engine, model] in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["ids"] == expected["ids"]
    assert found["tokens"] == expected["tokens"]
    if "logits" in found:
        assert np.abs(np.subtract(found["logits"], expected["logits"])).max() <= TOLERANCE
