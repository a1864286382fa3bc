"""Experts of the CPU platform: rows of zeros change nothing but the shapes that are computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.cpu.experts import _block, pad_rows
from tests.distributed.harness import run_distributed

HALVES = (torch.bfloat16, torch.float16)


def build_expert(dtype: torch.dtype) -> Any:
    """Megatron's MLP of small whole numbers: their sums are exact in every order."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=1,
        activation_func=torch.nn.functional.relu,
        add_bias_linear=False,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    group = torch.distributed.group.WORLD
    submodules = MLPSubmodules(ColumnParallelLinear, RowParallelLinear)
    expert = MLP(config, submodules, ffn_hidden_size=12, tp_group=group)
    for weight in expert.parameters():
        weight.data = torch.randint(-1, 2, weight.shape).to(dtype)
    return expert


def results(
    forward: Callable[..., Any], expert: Any, tokens: Tensor, scale: Tensor | None
) -> tuple[list[Tensor], int]:
    """Output and gradients of a forward, and how many rows were multiplied."""
    seen: list[int] = []
    counter = expert.linear_fc1.register_forward_pre_hook(lambda _, given: seen.append(len(*given)))
    output, _ = forward(expert, tokens, scale)
    counter.remove()
    (rows,) = seen
    inputs = [tokens, *expert.parameters(), *([] if scale is None else [scale])]
    grad = torch.arange(output.numel()).remainder(3).sub(1).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)], rows


def plain_and_padded(dtype: torch.dtype, rows: int, is_routed: bool) -> tuple[bool, int, int]:
    """Whether both give the same bits, and how many rows each multiplied."""
    from megatron.core.transformer.mlp import MLP

    torch.manual_seed(rows)
    expert = build_expert(dtype)
    tokens = torch.randint(-1, 2, (rows, 8)).to(dtype).requires_grad_()
    scale = torch.randint(1, 3, (rows,)).to(dtype).requires_grad_() if is_routed else None
    upstream = inspect.unwrap(MLP.forward)
    plain, plain_rows = results(upstream, expert, tokens, scale)
    padded, padded_rows = results(pad_rows(upstream), expert, tokens, scale)
    is_same = all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))
    return is_same, plain_rows, padded_rows


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", HALVES)
def test_zeros_change_no_bit(rows: int, dtype: torch.dtype) -> None:
    (found,) = run_distributed(1, plain_and_padded, dtype, rows, True)
    assert found == (True, rows, -(-rows // 64) * 64)


@pytest.mark.parametrize(("dtype", "is_routed"), [(torch.float32, True), (torch.bfloat16, False)])
def test_single_precision_and_dense_layers_are_left_alone(
    dtype: torch.dtype, is_routed: bool
) -> None:
    assert run_distributed(1, plain_and_padded, dtype, 5, is_routed) == [(True, 5, 5)]


def test_many_rows_grow_by_a_sixteenth_at_most() -> None:
    padded = {rows: -(-rows // _block(rows)) * _block(rows) for rows in range(1024, 40_000)}
    assert max(after / rows for rows, after in padded.items()) < 1 + 1 / 16
    assert len({after for rows, after in padded.items() if 8192 <= rows < 16384}) <= 17
