"""Shards that a checkpoint can hold, and the count of steps that goes on after a resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tst.settings.fully_sharded import uneven_shards
from megatron_tst.training.fully_sharded import continue_counting

SHAPES = [("norm.weight", (12,)), ("mlp.linear_fc1.weight", (24, 12))]


@pytest.mark.parametrize(
    ("ranks", "is_gated", "words"),
    [
        (1, True, None),
        (4, True, None),
        (3, False, None),
        (3, True, "mlp.linear_fc1.weight holds two projections"),
        (8, False, "unequal parts of the 12 rows of norm.weight"),
        (24, True, "unequal parts of the 12 rows of norm.weight"),
    ],
)
def test_shards_that_a_checkpoint_can_hold(ranks: int, is_gated: bool, words: str | None) -> None:
    message = uneven_shards(SHAPES, ranks, is_gated)
    assert (message is None) == (words is None)
    if message is not None and words is not None:
        assert f"over {ranks} ranks" in message
        assert words in message


@pytest.mark.parametrize("counts_by", ["parameter", "group"])
def test_a_resumed_adam_counts_on(counts_by: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], lr=0.1)
    # What Megatron makes for a load, and fills in place: moments and no count.
    moments = {"exp_avg": torch.full((3,), 0.2), "exp_avg_sq": torch.full((3,), 0.3)}
    adam.state[weight].update(moments)
    saved: dict[str, Any] = {"param_groups": [{"lr": 0.1}], "state": {}}
    if counts_by == "group":
        saved["param_groups"][0]["step"] = 5
    else:
        saved["state"]["common_step"] = torch.tensor(5.0)
    # In 16 bit the state lies one level deeper, beside the main weights.
    continue_counting(SimpleNamespace(optimizer=adam), {"optimizer": saved})
    if counts_by == "group":
        assert adam.param_groups[0]["step"] == 5
        return
    weight.grad = torch.ones(3)
    adam.step()
    assert adam.state[weight]["step"] == 6
    assert saved["state"]["common_step"] == 5
