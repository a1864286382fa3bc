"""How often the check of a micro-batch's loss waits for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import (
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.training import global_vars
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tst.training.forward_step import masked_mean_loss


class _CountsReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors: on a GPU each waits for all that is queued."""

    reads = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.reads += operator is torch.ops.aten._local_scalar_dense.default
        self.reads += operator is torch.ops.aten.is_nonzero.default
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = SimpleNamespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", settings)
    initialize_rerun_state_machine()
    yield
    destroy_rerun_state_machine()


@pytest.mark.usefixtures("checking")
def test_a_finite_loss_is_read_once() -> None:
    with _CountsReads() as counter:
        loss, positions, _ = masked_mean_loss(torch.ones(2, 3), torch.full((2, 3), 0.5))
    assert counter.reads == 1
    assert (loss.item(), positions.item()) == (3.0, 6)
