"""The Trainer of transformers over the switch: its losses, its resume and the folder it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

from examples.hf_trainer.train import SuperpositionTrainer
from examples.plain_torch.train import train
from megatron_tst import BagDataset, BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.data.bag_dataset import ArraySource
from tests.tiny_llama import save_tiny_llama

STEPS, SWITCH, BATCH, RATE = 6, 3, 4, 3e-3
TEXT = Path(__file__).parents[2] / "docs/training.md"


def dataset() -> BagDataset:
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=8, steps=SWITCH),
        total_steps=STEPS,
        batch_sizes=BatchSizes.constant(BATCH),
        sequence_length=16,
    )
    text = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8) % 64
    return BagDataset(ArraySource(text), schedule)


def trainer(model: Any, output: Path, **settings: Any) -> SuperpositionTrainer:
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SuperpositionTrainer(
        model, TrainingArguments(str(output), **arguments | settings), dataset()
    )


def losses_of(trained: SuperpositionTrainer) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in trained.state.log_history if "loss" in line}


def test_trains_over_the_switch_as_a_plain_loop_and_goes_on_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    folder = save_tiny_llama(tmp_path / "model")

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    plain = list(train(model(), dataset(), lambda step: RATE, weight_decay=0.1))
    # Two micro-batches are averaged, and the Trainer logs so many digits.
    assert list(losses_of(whole).values()) == pytest.approx(plain, rel=1e-4)

    resumed = trainer(model(), tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses_of(resumed)[STEPS] == pytest.approx(losses_of(whole)[STEPS], rel=1e-6)

    whole.save_model(str(tmp_path / "saved"))
    saved, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert type(saved) is LlamaForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    # transformers' own loss of plain text, which knows nothing of bags.
    batch = dataset().batch(STEPS - 1)
    with torch.no_grad():
        logits = saved(batch["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert float(loss) < losses_of(whole)[STEPS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 5}, r"max_steps is 5, and the schedule has 6"),
        ({"gradient_accumulation_steps": 1}, r"batches of 2 sequences .* make them equal"),
    ],
)
def test_other_batches_than_the_schedule_has_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path, **settings)
