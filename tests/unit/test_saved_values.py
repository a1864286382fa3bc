"""What is counted as wrong in the numbers of a checkpoint."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tst.checkpoint import stored_shards
from megatron_tst.checkpoint.saved_values import (
    count_far_weights,
    count_not_finite,
    count_other_moments,
    count_other_weights,
    moments_bound,
    torn_rows,
)
from megatron_tst.checkpoint.stored_shards import shards_by_key
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_writer import PlannedChunk, write_checkpoint


def masters(size: int = 4096) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3)) * 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_masters_are_right_and_their_neighbours_wrong(dtype: torch.dtype) -> None:
    values = masters()
    weights = values.to(dtype, copy=True)
    assert count_other_weights(values, weights) == (0, 0)
    weights[5] = weights[5] * 1.01 if dtype is torch.float32 else weights[5] * 1.02
    values[9] = 0
    assert count_other_weights(values, weights) == (2, 1)
    values[11] = torch.nan
    assert count_other_weights(values, weights) == (3, 1)


def test_half_way_both_neighbours_are_right() -> None:
    # Between 1 and the next number of bf16.
    half = torch.tensor([1 + 2**-8])
    for neighbour in (1.0, 1 + 2**-7):
        assert count_other_weights(half, torch.tensor([neighbour]).bfloat16()) == (0, 0)
    assert count_other_weights(half, torch.tensor([1 + 2**-6]).bfloat16()) == (1, 0)


def quantized(values: Tensor) -> Tensor:
    """As FP8 with a scale for a whole tensor would have it, in bf16."""
    scale = 448 / values.abs().max()
    return ((values * scale).to(torch.float8_e4m3fn).float() / scale).bfloat16()


def test_quantized_weights_are_near_and_others_far() -> None:
    values = masters(5000)
    assert count_other_weights(values, quantized(values))[0] > 4000
    assert count_far_weights(values, quantized(values)) == (0, 0)
    assert count_far_weights(values, quantized(values.roll(1))) == (5000, 0)
    assert count_far_weights(values, quantized(values.roll(1) * 50)) == (5000, 0)
    assert count_far_weights(torch.zeros(5000), quantized(values)) == (5000, 5000)
    # A fault that begins in the last block, which is shorter.
    values[-800:] = values[-800:].flip(0) + 0.1
    assert count_far_weights(values, quantized(masters(5000)))[0] == 5000 - 4096


def test_numbers_that_are_not_finite() -> None:
    values = torch.tensor([1.0, inf, -inf, torch.nan, 3e38, 3e38])
    assert count_not_finite(values) == 3
    # Their sum is infinite.
    assert count_not_finite(torch.full([4], 3e38)) == 0
    assert count_not_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)) == 1
    assert count_not_finite(torch.tensor([1, 2])) == 0


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.8, 0.99)])
def test_no_gradients_of_adam_exceed_the_bound(betas: tuple[float, float]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 1000))
    optimizer = torch.optim.Adam([parameter], betas=betas)
    generator = torch.Generator().manual_seed(1)
    bound = moments_bound(*betas)
    for step in range(60):
        gradients = torch.randn(3, 1000, generator=generator)
        gradients[1] = gradients[1].abs() * 1.1**step
        gradients[2] = gradients[2] * (torch.rand(1000, generator=generator) < 0.02) * 1e4
        parameter.grad = gradients
        optimizer.step()
        state = optimizer.state[parameter]
        first, second = state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()
        assert count_other_moments(first, second, bound) == 0
    assert count_other_moments(first, second * 0, bound) > 2500
    assert count_other_moments(first, second * 1e-4, bound) > 500
    assert moments_bound(0.95, 0.9) == inf


def test_rows_that_are_zero_in_part() -> None:
    rows = torch.ones(8, 64)
    assert torn_rows(rows.flatten(), 64) == 0
    rows[3] = 0
    assert torn_rows(rows.flatten(), 64) == 0
    rows[4, :20] = 0
    assert torn_rows(rows.flatten(), 64) == 1
    rows[6, -20:] = 0
    assert torn_rows(rows.flatten(), 64) == 2
    # Scattered: small gradients in fp16.
    rows[7, ::2] = 0
    assert torn_rows(rows.flatten(), 64) == 2


def test_a_shard_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = masters(1000).view(10, 100)
    chunks = [
        PlannedChunk("stacked", (layer,), (100,), torch.float32, values[layer].clone)
        for layer in range(10)
    ]
    chunks.append(PlannedChunk("whole", (), (10, 100), torch.bfloat16, values.clone))
    shapes = {"stacked": (10, 100), "whole": (10, 100)}
    write_checkpoint(tmp_path / "new", shapes, chunks, {}, lambda: None)
    monkeypatch.setattr(stored_shards, "PIECE_ELEMENTS", 64)
    index = TorchDistCheckpoint(tmp_path / "new").index
    shards = shards_by_key(tmp_path / "new", index)
    assert [shard.offsets for shard in shards["stacked"]] == [(layer, 0) for layer in range(10)]
    checksums: list[bool] = []
    for key, dtype in (("stacked", torch.float32), ("whole", torch.bfloat16)):
        pieces = [
            piece for shard in shards[key] for piece in shard.pieces(on_checksum=checksums.append)
        ]
        assert max(len(piece) for piece in pieces) == 64
        assert torch.equal(torch.cat(pieces), values.flatten().to(dtype))
    assert checksums == [True] * 11
    [whole] = shards["whole"]
    part = torch.cat(list(whole.pieces(150, 350)))
    assert torch.equal(part, values.flatten()[150:350].bfloat16())
