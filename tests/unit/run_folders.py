"""Run folders with known curves, for tests of the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Bags
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

SEED = 7

Curve = Callable[[int], float]


def schedule_of(config: SuperpositionConfig, bags: Bags = ()) -> SuperpositionSchedule:
    sizes = BatchSizes.constant(BATCH)
    return SuperpositionSchedule(config, TOTAL_STEPS, sizes, LENGTH, bags=bags, seed=SEED)


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
    bags: Bags = (),
) -> None:
    """One process's event file: the scalars that Megatron and the training entry log."""
    schedule = schedule_of(config, bags)
    writer = SummaryWriter(str(run / "tensorboard"), filename_suffix=suffix)
    for step in steps:
        scalars = {
            "lm loss": loss(step) + 0.1,
            "lm loss validation": loss(step),
            "tst/seconds": step * seconds_per_step,
            "tst/data tokens": schedule.data_tokens(step),
            "tst/equivalent tokens": schedule.equivalent_tokens(step),
        }
        phase = schedule.phase_at(step - 1)
        if phase.is_superposed:
            offsets = range(1, phase.bag_size + 1)
            scalars |= {f"tst/loss at offset {i}": loss(step) + i for i in offsets}
        for tag, value in scalars.items():
            if tag != leave_out:
                writer.add_scalar(tag, value, step)
    if test_loss is not None:
        writer.add_scalar("lm loss validation", test_loss, steps[-1])
    writer.close()


def write_info(run: Path, config: SuperpositionConfig, bags: Bags = (), **changes: Any) -> None:
    schedule = schedule_of(config, bags)
    info = {
        "superposition": config.to_dict(),
        "phases": [phase.record() for phase in schedule.phases],
        "switch_step": schedule.switch_step,
        "total_steps": TOTAL_STEPS,
        "batch_sizes": [[0, BATCH]],
        "sequence_length": LENGTH,
        "text_share": 1.0,
        "parameters": 1_234_567,
        "seed": SEED,
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
    write_info(run, config, options.get("bags", ()))
    return run


def tst_loss(step: int) -> float:
    """9 in phase 1, then straight down from 6 at step 30 to 2.5 at step 100."""
    return 9.0 if step <= 25 else 6.0 - (step - 30) * 0.05


def baseline_loss(step: int) -> float:
    """Straight down from 5.7 at step 10 to 3 at step 100."""
    return 6.0 - step * 0.03
