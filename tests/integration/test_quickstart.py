"""The quickstart from text to report, with a handful of steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zygote import ROOT


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("tokens", [[], ["--bpe"]], ids=["bytes", "subwords"])
def test_the_quickstart_trains_exports_and_reports(tmp_path: Path, tokens: list[str]) -> None:
    command = [sys.executable, "tools/quickstart.py", "--steps", "10", "--text-bytes", "3000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path), *tokens],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.html").read_text()
    assert "At equal FLOPs" in report
    assert "def __init__" in report
    assert "Largest difference between its logits and Megatron's" in done.stdout
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    bits = [model["text"]["bits_per_byte"] for model in (evaluation, evaluation["compared_with"])]
    assert all(1 < value < 8 for value in bits)
    assert f"{bits[0]:.4f}" in done.stdout
    for arm in ("baseline", "tst"):
        config = json.loads((tmp_path / "huggingface" / arm / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["vocab_size"] == (2048 if tokens else 256)
        assert (tmp_path / arm / "checkpoints" / "iter_0000010").is_dir()
