"""What a reset at the switch clears."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_tst.training.switch import reset_optimizer_state


@pytest.mark.parametrize("step", [3, torch.tensor(3, dtype=torch.int32)], ids=["int", "tensor"])
def test_the_count_of_steps_begins_anew(step: int | torch.Tensor) -> None:
    """A tensor is that of an Adam that CUDA graphs can capture: a graph has its address."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], capturable=isinstance(step, torch.Tensor))
    optimizer.state[weight] = {"exp_avg": torch.ones(2), "master_param": torch.ones(2)}
    (group,) = optimizer.param_groups
    group["step"] = step
    reset_optimizer_state(SimpleNamespace(optimizer=optimizer))
    assert int(group["step"]) == 0
    assert isinstance(step, int) or group["step"] is step
    assert not optimizer.state[weight]["exp_avg"].any()
    assert optimizer.state[weight]["master_param"].all()
