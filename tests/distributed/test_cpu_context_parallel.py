"""Attention of the CPU platform under context parallelism, against one rank with all positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_tst.cpu.attention import FusedCoreAttention
from megatron_tst.cpu.context_parallel import gather_sequence
from tests.distributed.harness import run_distributed

BATCH, HEADS, HEAD_DIM = 3, 4, 16
LENGTH = 2 * 4 * 40


def core_attention(cp: int = 1, **settings: Any) -> FusedCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        context_parallel_size=cp,
    )
    return FusedCoreAttention(config, 1, AttnMaskType.causal, "self", **settings)


def draw(groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result for the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, HEAD_DIM) for heads in (HEADS, groups, groups)] + [(HEADS * HEAD_DIM,)]
    return [torch.randn((LENGTH, BATCH, *shape), generator=generator).to(dtype) for shape in shapes]


def slice_of_rank(whole: Tensor) -> Tensor:
    """What upstream gives this rank of [l, b, ...]."""
    batch = {"x": whole.transpose(0, 1).contiguous()}
    local: Tensor = get_batch_on_this_cp_rank(batch, False, cp_group=dist.group.WORLD)["x"]
    return local.transpose(0, 1)


def attend(layer: FusedCoreAttention, tensors: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of queries, keys and values."""
    *inputs, grad = tensors
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    context = layer(*leaves, None)
    return [context.detach(), *torch.autograd.grad(context, leaves, grad)]


def relative_errors(groups: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Errors of context parallelism and of one rank, against one rank in float64."""
    tensors = draw(groups, dtype)
    layer = core_attention(
        dist.get_world_size(), pg_collection=ProcessGroupCollection(cp=dist.group.WORLD)
    )
    parallel = attend(layer, [slice_of_rank(x) for x in tensors])
    assert all(found.dtype == dtype for found in parallel)
    alone = attend(core_attention(), tensors)
    reference = attend(core_attention(), [x.double() for x in tensors])
    errors = []
    for found, single, expected in zip(parallel, alone, reference, strict=True):
        local = slice_of_rank(expected)
        pair = [(x.double() - local).norm() / local.norm() for x in (found, slice_of_rank(single))]
        errors.append((float(pair[0]), float(pair[1])))
    return errors


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("cp", [2, 4])
def test_float32_matches_one_rank(cp: int, groups: int) -> None:
    for errors in run_distributed(cp, relative_errors, groups, torch.float32):
        # Sums of up to 320 products in float32: measured 3e-7 at most.
        assert max(error for error, _ in errors) < 1e-6


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("cp", [2, 4])
def test_bfloat16_is_nearly_as_close_to_float64_as_one_rank(cp: int, groups: int) -> None:
    for errors in run_distributed(cp, relative_errors, groups, torch.bfloat16):
        # Parts of the gradients of keys and values are rounded before they are added up: measured
        # 1.14 times the error of one rank.
        for error, error_of_one_rank in errors:
            assert error < 1.25 * error_of_one_rank


def gather_and_weigh() -> tuple[Tensor, Tensor, Tensor]:
    cp, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.arange(4.0 * cp)[:, None].expand(-1, 2)
    local = slice_of_rank(whole).requires_grad_()
    assert dist.group.WORLD is not None
    gathered = gather_sequence(local, dist.group.WORLD)
    # A gradient that is not contiguous and differs between ranks.
    weights = (rank + 1) * whole.t().contiguous().t()
    (grad,) = torch.autograd.grad(gathered, local, weights)
    return gathered.detach() - whole, grad, slice_of_rank(whole) * sum(range(1, cp + 1))


@pytest.mark.parametrize("cp", [2, 4])
def test_gather_restores_the_order_and_its_gradient_is_summed(cp: int) -> None:
    for difference, grad, expected in run_distributed(cp, gather_and_weigh):
        assert not difference.any()
        assert torch.equal(grad, expected)


@contextmanager
def model_parallel(**sizes: int) -> Iterator[None]:
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def group_without_a_collection() -> list[int]:
    with model_parallel(context_parallel_size=2):
        layer = core_attention(2)
        assert layer.cp_group is not None
        return dist.get_process_group_ranks(layer.cp_group)


def test_group_is_megatrons_unless_one_is_given() -> None:
    assert run_distributed(4, group_without_a_collection) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def messages_of_refusals() -> list[str]:
    layer = core_attention(2, pg_collection=ProcessGroupCollection(cp=dist.group.WORLD))
    *inputs, _ = (slice_of_rank(x) for x in draw(HEADS, torch.float32))
    messages = []
    for arguments in ((torch.zeros(1, 1, 2, 2, dtype=torch.bool),), (None, AttnMaskType.no_mask)):
        with pytest.raises(ValueError, match="attention_mask") as error:
            layer(*inputs, *arguments)
        messages.append(str(error.value))
    return messages


def test_masks_are_refused() -> None:
    for messages in run_distributed(2, messages_of_refusals):
        assert all("--context-parallel-size" in message for message in messages)
