"""Experts of the CPU platform: rows of zeros change nothing but the shapes that are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_tst.cpu.experts import _block, pad_rows


class Expert(nn.Module):
    """Megatron's forward of an expert, less its parallel layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12, bias=False, dtype=dtype)
        self.rows: list[int] = []

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None
    ) -> tuple[Tensor, None]:
        self.rows.append(len(hidden_states))
        output = self.fc1(hidden_states)
        return output if per_token_scale is None else output * per_token_scale[:, None], None


def gradients(
    forward: object, expert: Expert, tokens: Tensor, scale: Tensor | None
) -> tuple[Tensor, ...]:
    inputs = [tokens, expert.fc1.weight] if scale is None else [tokens, expert.fc1.weight, scale]
    output, _ = forward(expert, tokens, scale)  # type: ignore[operator]
    # Small whole numbers: their sums are exact in every order.
    grad = torch.arange(output.numel()).remainder(5).sub(2).view_as(output).to(output.dtype)
    return (output.detach(), *torch.autograd.grad(output, inputs, grad))


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_change_no_bit(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    expert = Expert(dtype)
    expert.fc1.weight.data = torch.randint(-2, 3, (12, 8)).to(dtype)
    tokens = torch.randint(-2, 3, (rows, 8)).to(dtype).requires_grad_()
    scale = torch.randint(1, 3, (rows,)).to(dtype).requires_grad_()
    plain = gradients(Expert.forward, expert, tokens, scale)
    padded = gradients(pad_rows(Expert.forward), expert, tokens, scale)
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))
    assert expert.rows == [rows, -(-rows // 64) * 64]


def test_single_precision_and_dense_layers_are_left_alone() -> None:
    for dtype, scale in ((torch.float32, torch.ones(5)), (torch.bfloat16, None)):
        expert = Expert(dtype)
        tokens = torch.ones(5, 8, dtype=dtype, requires_grad=True)
        pad_rows(Expert.forward)(expert, tokens, scale)
        assert expert.rows == [5]


def test_many_rows_grow_by_a_sixteenth_at_most() -> None:
    padded = {rows: -(-rows // _block(rows)) * _block(rows) for rows in range(1024, 40_000)}
    assert max(after / rows for rows, after in padded.items()) < 1 + 1 / 16
    assert len({after for rows, after in padded.items() if 8192 <= rows < 16384}) <= 17
