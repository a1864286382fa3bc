"""Multi-latent attention of megatron-core: keys shared by the heads of tensor-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from scripts.host_faults.ranks import on_ranks


def _gradient_through_the_gather() -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    rank = parallel_state.get_tensor_model_parallel_rank()
    columns = torch.ones(1, 1, requires_grad=True)
    # What the heads of a rank make of the keys: once on the first, twice on the second.
    (gather_from_tensor_model_parallel_region(columns) * (rank + 1)).sum().backward()
    assert columns.grad is not None
    return columns.grad.flatten().tolist()


def latent_keys_of_local_modules() -> str:
    """Issue 1699: the gather of the keys takes a rank's gradient for the sum over all ranks."""
    gradients = on_ranks(2, _gradient_through_the_gather, tensor_model_parallel_size=2)
    assert gradients != [[3.0], [3.0]], "mended"
    return f"gradients of two ranks, 3 each expected: {gradients}"


def _gradient_after_the_reduction() -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=2, num_attention_heads=2, tensor_model_parallel_size=2
    )
    model: Any = torch.nn.Module()
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    # As TELinear marks a weight that all ranks have.
    model.linear_kv_down_proj = torch.nn.Linear(2, 1, bias=False)
    weight: Any = model.linear_kv_down_proj.weight
    weight.sequence_parallel, weight.tensor_model_parallel = config.sequence_parallel, False
    rank = parallel_state.get_tensor_model_parallel_rank()
    weight.main_grad = torch.full((2,), float(rank + 1))
    finalize_model_grads.__globals__["_allreduce_non_tensor_model_parallel_grads"](
        [model], config, parallel_state.get_tensor_model_parallel_group()
    )
    return list(weight.main_grad.tolist())


def latent_keys_without_sequence_parallelism() -> str:
    """PR 6839: parts of the gradient of the projection to the keys are not summed over TP."""
    gradients = on_ranks(2, _gradient_after_the_reduction, tensor_model_parallel_size=2)
    assert gradients[0] != gradients[1], "mended"
    return f"without sequence parallelism, parts of two ranks after the reduction: {gradients}"
