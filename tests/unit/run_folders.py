"""Run folders with known curves, for tests of the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule

BASELINE = SuperpositionConfig()
TST = SuperpositionConfig(bag_size=4, step_ratio=0.25)
TOTAL_STEPS, BATCH, LENGTH = 100, 2, 8
TOKENS_PER_STEP = BATCH * LENGTH
SETTINGS = {
    "lr": 0.001,
    "num_layers": 2,
    "hidden_size": 8,
    "data_path": ["/somewhere/corpus"],
    "split": "98,2,0",
    "tokenizer_type": "NullTokenizer",
}
# TensorBoard stores float32.
RTOL = 1e-6

Curve = Callable[[int], float]


def schedule_of(config: SuperpositionConfig) -> SuperpositionSchedule:
    return SuperpositionSchedule(config, TOTAL_STEPS, BatchSizes.constant(BATCH), LENGTH)


def write_events(
    run: Path,
    config: SuperpositionConfig,
    loss: Curve,
    *,
    steps: range = range(10, TOTAL_STEPS + 1, 10),
    seconds_per_step: float = 0.5,
    suffix: str = "",
    leave_out: str = "",
    test_loss: float | None = None,
) -> None:
    """One process's event file: the scalars that Megatron and the training entry log."""
    schedule = schedule_of(config)
    writer = SummaryWriter(str(run / "tensorboard"), filename_suffix=suffix)
    for step in steps:
        scalars = {
            "lm loss": loss(step) + 0.1,
            "lm loss validation": loss(step),
            "tst/seconds": step * seconds_per_step,
            "tst/data tokens": schedule.data_tokens(step),
            "tst/equivalent tokens": schedule.equivalent_tokens(step),
        }
        if step <= schedule.switch_step:
            offsets = range(1, config.bag_size + 1)
            scalars |= {f"tst/loss at offset {i}": loss(step) + i for i in offsets}
        for tag, value in scalars.items():
            if tag != leave_out:
                writer.add_scalar(tag, value, step)
    if test_loss is not None:
        writer.add_scalar("lm loss validation", test_loss, steps[-1])
    writer.close()


def write_info(run: Path, config: SuperpositionConfig, **changes: Any) -> None:
    info = {
        "superposition": config.to_dict(),
        "switch_step": schedule_of(config).switch_step,
        "total_steps": TOTAL_STEPS,
        "batch_sizes": [[0, BATCH]],
        "sequence_length": LENGTH,
        "text_share": 1.0,
        "parameters": 1_234_567,
        "seed": 7,
        "settings": SETTINGS,
        "commit": "abc1234",
        "machine": {"cpu": "Example <CPU>", "cores": 2},
        "command": "python -m megatron_tst.pretrain --num-layers 2",
    }
    path = run / "tensorboard" / "tst_run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info | changes))


def make_run(run: Path, config: SuperpositionConfig, loss: Curve, **options: Any) -> Path:
    write_events(run, config, loss, **options)
    write_info(run, config)
    return run


def tst_loss(step: int) -> float:
    """9 in phase 1, then straight down from 6 at step 30 to 2.5 at step 100."""
    return 9.0 if step <= 25 else 6.0 - (step - 30) * 0.05


def baseline_loss(step: int) -> float:
    """Straight down from 5.7 at step 10 to 3 at step 100."""
    return 6.0 - step * 0.03
