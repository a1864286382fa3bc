"""How often a micro-batch waits for the device, and the gradient that its losses get."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import backward_step, forward_step_calc_loss
from megatron.core.rerun_state_machine import (
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import global_vars
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tst.training.forward_step import (
    _without_masked,
    gradient_of_losses,
    masked_mean_loss,
)


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


@pytest.mark.usefixtures("checking")
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_scale", [None, 4096.0])
def test_the_gradient_of_the_losses_is_known_before_the_backward(
    per_token: bool, loss_scale: float | None
) -> None:
    """To the bit, by the host's own scaling and backward."""
    scale: Any = None if loss_scale is None else lambda loss: loss * loss_scale
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=per_token,
        grad_scale_func=scale,
    )  # fmt: skip
    for positions in (1, 7, 2047):
        losses = torch.rand(2, 1024, requires_grad=True)
        mask = (torch.randperm(2048) < positions).float().view(2, 1024)
        expected = gradient_of_losses(mask, config, num_microbatches=3)
        loss, _ = forward_step_calc_loss(
            SimpleNamespace(), losses, partial(masked_mean_loss, mask), config, None, False, 3, [],
            cp_group_size=1, is_last_stage=True,
        )  # fmt: skip
        backward_step([None], [loss], [None], config)
        assert losses.grad is not None
        assert torch.equal(losses.grad, expected * mask)


@pytest.mark.usefixtures("checking")
def test_losses_that_are_masked_have_one_gradient_that_strides_show() -> None:
    """As the linear loss needs it, through what the model and the schedule do with its losses."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    found: dict[str, torch.Tensor] = {}
    for is_masked in (True, False):
        leaf = torch.rand(3, 2).masked_fill(mask.t() == 0, 0).requires_grad_()
        of_model = leaf.view(3, 2)  # [l, b]
        of_model.register_hook(lambda grad: found.__setitem__("gradient", grad))
        losses = of_model.transpose(0, 1).contiguous()
        loss, positions, report = masked_mean_loss(mask, losses, is_masked)
        assert loss == report["lm loss"][0] == (losses * mask).sum()
        loss /= positions.clamp(min=1)
        loss /= 3
        loss.backward()
        assert found["gradient"].stride() == ((0, 0) if is_masked else (1, 3))
        assert float(found["gradient"][0, 0]) == pytest.approx(1 / 12)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_labels_take_the_mask(shape: tuple[int, ...]) -> None:
    mask, labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), torch.ones(shape).long()
    masked = _without_masked(labels, mask)
    assert masked is not None
    assert torch.equal(
        masked == -100, (mask == 0).view(2, 3, *[1] * (len(shape) - 2)).expand(shape)
    )
    assert bool((labels == 1).all())
