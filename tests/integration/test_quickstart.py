"""The quickstart from text to report, with a handful of steps."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_tst.common.precision import faster_precision
from megatron_tst.common.progress import INTERVAL_VARIABLE
from megatron_tst.study import pace
from megatron_tst.study.quickstart import Settings, TimeLimit, train_in_time
from tests.zygote import ROOT

pytestmark = pytest.mark.slow


# Most of the time is that of starting processes, twice or more of it where others run.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tokens", [[], ["--bpe"]], ids=["bytes", "subwords"])
def test_the_quickstart_trains_exports_and_reports(tmp_path: Path, tokens: list[str]) -> None:
    command = [sys.executable, "tools/quickstart.py", "--steps", "10", "--text-bytes", "3000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), INTERVAL_VARIABLE: "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path), *tokens],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for arm in ("baseline", "tst"):
        assert f"{arm}: step 0 of 10 (0%), loss -" in done.stdout
    precision = faster_precision(on_gpu=False)
    assert f"Precision: {precision}, products of bf16 being " in done.stdout
    report = (tmp_path / "report.html").read_text()
    assert f"Trained in {precision}." in report
    assert "At equal FLOPs" in report
    assert "def __init__" in report
    (address,) = re.findall(r'<a href="([^"]+)">What several seeds say', report)
    assert (tmp_path / address).resolve() == ROOT / "docs/results.md"
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


@pytest.mark.timeout(900)
def test_both_arms_are_shortened_alike_where_time_is_short(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "STEP_UNIT", 4)
    settings = Settings(length=32, hidden=16, ffn=32, steps=40, precision="fp32")
    limit = TimeLimit(time.monotonic(), minutes=0, may_shorten=True)
    said = io.StringIO()
    arms, plan = train_in_time(tmp_path, settings, corpus, limit, Console(file=said))
    assert plan is not None
    assert (plan.planned_steps, plan.steps) == (40, 4)
    assert "Both arms do 4, for equal FLOPs" in said.getvalue()
    assert "fewer would show nothing" in said.getvalue()
    for arm in arms:
        assert arm.folder.state() == "finished"
        assert (arm.folder.checkpoints / "iter_0000004").is_dir()
        described = json.loads((arm.folder.path / "tensorboard" / "tst_run.json").read_text())
        assert described["total_steps"] == 4
        assert described["settings"]["bf16"] is False
