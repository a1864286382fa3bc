"""Loops without Megatron: they train as Megatron does, and do not need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM

from examples.plain_torch.train import train
from megatron_tst import BagDataset, BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.commands import convert_hf_to_megatron
from tests.runs import SmallRun
from tests.tiny_llama import save_tiny_llama
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

STEPS, SWITCH, RATE = 8, 5, 3e-3
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variant", ["full", "input-only", "output-only"])
def test_the_losses_are_those_of_megatron(
    launcher: Launcher, corpus: Path, tmp_path: Path, variant: str
) -> None:
    folder = save_tiny_llama(tmp_path / "model", rms_norm_eps=1e-5, initializer_range=0.05)
    convert = ["--model", str(folder), "--output", str(tmp_path / "release")]
    assert convert_hf_to_megatron.main(convert) == 0
    run = SmallRun(corpus, tmp_path / "run").with_(
        load=tmp_path / "release",
        finetune=True,
        num_layers=None,
        hybrid_layer_pattern="*-*-",
        save=None,
        eval_iters=0,
        train_iters=STEPS,
        lr=RATE,
        lr_decay_style="constant",
        lr_warmup_iters=0,
        lr_wsd_decay_style=None,
        lr_wsd_decay_iters=None,
        tst_bag_size=8,
        tst_steps=SWITCH,
        tst_variant=variant,
    )
    launcher.run(run.argv, run.log)
    losses = run.scalars()["lm loss"]

    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=8, steps=SWITCH, variant=variant),
        total_steps=STEPS,
        batch_sizes=BatchSizes.constant(4),
        sequence_length=32,
    )
    source = IndexedDataset(str(corpus))
    of_training = np.arange(round(0.9 * len(source.sequence_lengths)), dtype=np.int32)
    dataset = BagDataset(source, schedule, seed=11, documents=of_training)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = list(train(model, dataset, lambda step: RATE, weight_decay=0.1))
    assert plain == pytest.approx([losses[step] for step in range(1, STEPS + 1)], rel=1e-5)


def test_neither_the_example_nor_the_numerics_import_megatron(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes((ROOT / "docs/training.md").read_bytes())
    program = (
        "import runpy, sys\n"
        "sys.modules['megatron'] = None\n"
        f"sys.argv = ['train.py', {str(text)!r}, '--steps', '10']\n"
        "runpy.run_path('examples/plain_torch/train.py', run_name='__main__')\n"
    )
    environment: dict[str, Any] = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step     3  bag size 1  loss" in done.stdout
