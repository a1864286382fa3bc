"""Where megatron-core is not installed: what works, and what says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that the extra ``megatron`` brings.
BLOCKED = """
import sys

EXTRA = {
    *("megatron", "matplotlib", "psutil", "rich", "safetensors", "tensorboard", "tokenizers"),
    *("transformers", "yaml", "zstandard"),
}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""
IMPORTS = """
import importlib, pkgutil
import megatron_tst, megatron_tst.ops, megatron_tst.settings

for package in (megatron_tst.ops, megatron_tst.settings):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # Triton's kernels are for machines that have it.
        if "kernels." not in module.name:
            importlib.import_module(module.name)
for name in ("stream", "bags", "bag_dataset"):
    importlib.import_module("megatron_tst.data." + name)
of_megatron = {name for name in dir(megatron_tst) if name.endswith(("Model", "GPTDataset"))}
for name in set(dir(megatron_tst)) - of_megatron:
    getattr(megatron_tst, name)
for name in sorted(of_megatron):
    try:
        getattr(megatron_tst, name)
    except ImportError as error:
        print(error)
"""
TRAINS = """
import numpy, torch
from megatron_tst import BagDataset, BagEmbedding, BatchSizes, MultiHotCrossEntropyLoss
from megatron_tst import SuperpositionConfig, SuperpositionSchedule
from megatron_tst.data.bag_dataset import ArraySource

schedule = SuperpositionSchedule(
    SuperpositionConfig(bag_size=4, step_ratio=0.5), 6, BatchSizes.constant(2), sequence_length=8
)
text = numpy.tile(numpy.arange(16), 100)
dataset, embedding = BagDataset(ArraySource(text), schedule), BagEmbedding(16, 8)
head = torch.nn.Linear(8, 16)
loss_of = MultiHotCrossEntropyLoss(schedule.config.target_weights())
optimizer = torch.optim.SGD([*embedding.parameters(), *head.parameters()], lr=0.5)
losses = []
for step in range(6):
    batch = dataset.batch(step)
    loss = loss_of(head(embedding(batch["tokens"])), batch["labels"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[2] < losses[0] and losses[5] < losses[3], losses
print("trained")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_numerics_settings_and_bags_work() -> None:
    done = run("-c", BLOCKED + IMPORTS + TRAINS)
    assert done.returncode == 0, done.stderr
    *refused, trained = done.stdout.splitlines()
    assert trained == "trained"
    assert [line.partition(":")[0] for line in refused] == [
        "megatron_tst.SuperpositionGPTDataset",
        "megatron_tst.SuperpositionGPTModel",
        "megatron_tst.SuperpositionHybridModel",
    ]
    assert all("pip install 'megatron-tst[megatron]'" in line for line in refused)


@pytest.mark.parametrize("argument", [[], ["--help"]])
def test_the_launch_says_in_a_line_what_to_install(argument: list[str]) -> None:
    program = "import runpy; runpy.run_module('megatron_tst.pretrain', run_name='__main__')"
    done = run("-c", BLOCKED + program, *argument)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: megatron-core is not installed, and training in Megatron needs it: "
        "pip install 'megatron-tst[megatron]'.\n"
    )
