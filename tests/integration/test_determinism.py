"""Two runs of one command give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.layouts import LAYOUTS, arguments_of
from tests.runs import SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

STEPS = 4
# The layouts whose collectives could add up in another order each time.
CASES = [
    ("Llama", "one process", {}),
    ("Llama", "TP 2 + SP, DP 2, distributed optimizer", {}),
    ("Llama", "PP 2, CP 2", {}),
    ("Qwen3-MoE", "EP 2, alltoall", {"tst_variant": "output-only"}),
    ("Qwen3-MoE", "one process", {"tst_objective": "bce", "tst_target_weighting": "uniform"}),
]


@pytest.mark.parametrize(("model", "layout", "settings"), CASES)
def test_two_runs_are_bit_equal(
    launcher: Launcher,
    small_run: SmallRun,
    tmp_path: Path,
    model: str,
    layout: str,
    settings: dict[str, Any],
) -> None:
    run = small_run.with_(
        **arguments_of(model, layout),
        **settings,
        bf16=True,
        tst_bag_size=4,
        tst_steps=2,
        train_iters=STEPS,
        eval_interval=STEPS + 1,
        micro_batch_size=1,
        hidden_dropout=0.1,
    )
    runs = [run.with_(tmp_path / name) for name in ("first", "second")]
    for one in runs:
        launcher.run(one.argv, one.log, world_size=LAYOUTS[layout].processes)
    first, second = runs
    assert_bit_equal(second.checkpoint(STEPS), first.checkpoint(STEPS))
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        assert second.scalars()[tag] == first.scalars()[tag]
