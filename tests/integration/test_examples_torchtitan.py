"""torchtitan's Llama 3 debug model over the switch, sharded by FSDP2 over two gloo ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("TORCHTITAN_FOLDER", ROOT / ".venv/torchtitan"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason="torchtitan is not installed: make setup-torchtitan"
    ),
]

STEPS, SWITCH = 4, 2


def train(output: Path) -> dict[int, float]:
    """Loss of each step that this launch trains."""
    settings = {"bag-size": 4, "steps": STEPS, "step-ratio": SWITCH / STEPS, "length": 32}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *("examples/torchtitan/train.py", "docs/training.md", f"--output={output}"),
            *(f"--{name}={value}" for name, value in settings.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{FOLDER}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"step: +(\d+) +loss: +([\d.]+)", done.stdout + done.stderr)
    return {int(step): float(loss) for step, loss in lines}


def test_trains_over_the_switch_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    losses = train(tmp_path)
    assert list(losses) == list(range(1, STEPS + 1))
    # That of 2048 equally likely tokens is 7.62 in both phases: bags are counted as positions.
    assert 7 < losses[1] < 9
    assert 3 < losses[STEPS] < losses[SWITCH + 1] < losses[1]
    shutil.rmtree(tmp_path / f"checkpoint/step-{STEPS}")
    resumed = train(tmp_path)
    assert resumed == {step: losses[step] for step in range(SWITCH + 1, STEPS + 1)}
