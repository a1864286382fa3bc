"""Exchange of uneven numbers of tokens on the CPU platform, as expert parallelism does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.harness import run_distributed

HIDDEN = 4
EXPERTS = 4

# Rows that rank i sends to rank j. Rank 1 gets nothing in the second, sends nothing in the third.
EXCHANGES = [
    [[3, 1], [0, 2]],
    [[4, 0], [3, 0]],
    [[2, 1], [0, 0]],
    [[0, 0], [0, 0]],
]


def on_platform(function: Callable[..., None], *args: Any) -> None:
    run_distributed(2, function, *args, cpu_platform=True)


def draw(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=generator).to(dtype)


def with_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    result = function(leaf)
    return result.detach(), torch.autograd.grad(result, leaf, grad)[0]


def exchange(counts: list[list[int]], dtype: torch.dtype, use_stream: bool) -> None:
    from megatron.core.tensor_parallel.mappings import all_to_all
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    rank = dist.get_rank()
    sent, received = counts[rank], [row[rank] for row in counts]
    # As the dispatcher makes them.
    splits = [maybe_move_tensor_to_cpu(torch.tensor(x), as_numpy=True) for x in (received, sent)]
    pieces = [draw(sum(row), source, dtype).split(row) for source, row in enumerate(counts)]
    rows_received = [sum(row[target] for row in counts) for target in range(2)]
    grads = [
        draw(rows, 10 + target, dtype).split([row[target] for row in counts])
        for target, rows in enumerate(rows_received)
    ]
    actual, actual_grad = with_gradient(
        lambda x: all_to_all(dist.group.WORLD, x, *splits, use_nccl_stream=use_stream),
        torch.cat(pieces[rank]),
        torch.cat(grads[rank]),
    )
    assert torch.equal(actual, torch.cat([row[rank] for row in pieces]))
    assert torch.equal(actual_grad, torch.cat([row[rank] for row in grads]))


@pytest.mark.parametrize("counts", EXCHANGES)
@pytest.mark.parametrize(
    ("dtype", "use_stream"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_all_to_all_sends_any_number_of_rows(
    counts: list[list[int]], dtype: torch.dtype, use_stream: bool
) -> None:
    on_platform(exchange, counts, dtype, use_stream)


def gather_and_reduce_scatter(counts: list[int], dtype: torch.dtype) -> None:
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    rank, group = dist.get_rank(), dist.group.WORLD
    parts = [draw(rows, source, dtype) for source, rows in enumerate(counts)]
    wholes = [draw(sum(counts), 10 + source, dtype) for source in range(2)]
    gathered, grad = with_gradient(
        lambda x: gather_from_sequence_parallel_region(x, group=group, output_split_sizes=counts),
        parts[rank],
        wholes[rank],
    )
    assert torch.equal(gathered, torch.cat(parts))
    assert torch.equal(grad, sum(wholes, torch.zeros_like(gathered)).split(counts)[rank])
    scattered, grad = with_gradient(
        lambda x: reduce_scatter_to_sequence_parallel_region(
            x, group=group, input_split_sizes=counts
        ),
        wholes[rank],
        parts[rank],
    )
    assert torch.equal(scattered, sum(wholes, torch.zeros_like(gathered)).split(counts)[rank])
    assert torch.equal(grad, torch.cat(parts))


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [2, 0], [0, 0], [2, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_gather_and_scatter_any_number_of_rows(
    counts: list[int], dtype: torch.dtype
) -> None:
    on_platform(gather_and_reduce_scatter, counts, dtype)


def gather_asynchronously(counts: list[int]) -> None:
    parts = [draw(rows, source) for source, rows in enumerate(counts)]
    received = [torch.empty_like(part) for part in parts]
    handle = dist.all_gather(received, parts[dist.get_rank()], async_op=True)
    assert handle is not None
    handle.wait()
    assert all(torch.equal(*pair) for pair in zip(received, parts, strict=True))


@pytest.mark.parametrize("counts", [[2, 2], [1, 3]])
def test_gather_has_a_handle(counts: list[int]) -> None:
    on_platform(gather_asynchronously, counts)


def dispatch_and_combine(parallel_sizes: dict[str, int], chosen: list[list[int]]) -> None:
    """Sends each token to two experts; expert e multiplies by e + 1."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        sequence_parallel="tensor_model_parallel_size" in parallel_sizes,
        **parallel_sizes,
    )
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **parallel_sizes)
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        local_experts = EXPERTS // groups.ep.size()
        first = groups.ep.rank() * local_experts
        indices = list(range(first, first + local_experts))
        dispatcher = MoEAlltoAllTokenDispatcher(local_experts, indices, config, groups)
        # Ranks have different numbers of tokens, which makes every split uneven.
        chosen = chosen[dist.get_rank() :]
        tokens = len(chosen)
        hidden = draw(tokens, dist.get_rank())[:, None]
        routing = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
        routing.scatter_(1, torch.tensor(chosen), True)
        probs = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(5)) * routing
        factors = torch.arange(1.0, EXPERTS + 1)

        def through_experts(x: Tensor) -> Tensor:
            sent = dispatcher.dispatch_preprocess(x, routing, probs)
            received, counts, weights = dispatcher.dispatch_postprocess(
                *dispatcher.token_dispatch(*sent)
            )
            # Tensor-parallel ranks of an expert compute parts of a sum.
            factor = factors[indices].repeat_interleave(counts) / groups.expt_tp.size()
            part = received * (factor * weights)[:, None]
            combined = dispatcher.token_combine(dispatcher.combine_preprocess(part))
            return dispatcher.combine_postprocess(combined)

        grad = draw(tokens, 7)[:, None]
        actual = with_gradient(through_experts, hidden, grad)
        scale = (probs * factors).sum(1)[:, None, None]
        torch.testing.assert_close(actual, (hidden * scale, grad * scale))
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    "parallel_sizes",
    [
        {"expert_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ],
    ids=["EP2", "ETP2", "EP2 in TP2"],
)
@pytest.mark.parametrize(
    "chosen",
    [[[0, 1], [2, 3], [3, 0]], [[0, 1], [1, 0], [0, 1]]],
    ids=["all experts", "experts of rank 0 only"],
)
def test_dispatcher_brings_tokens_to_their_experts_and_back(
    parallel_sizes: dict[str, int], chosen: list[list[int]]
) -> None:
    on_platform(dispatch_and_combine, parallel_sizes, chosen)
