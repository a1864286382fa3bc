"""The losses of megatron-core."""

from __future__ import annotations

import torch

from scripts.host_faults.ranks import on_ranks


def _loss_of_gathered_logits() -> tuple[float, list[float]]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], requires_grad=True)
    group = parallel_state.get_tensor_model_parallel_group()
    loss = vocab_parallel_cross_entropy(logits.clone(), torch.tensor([[3]]), tp_group=group)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.item(), [round(value, 3) for value in logits.grad.flatten().tolist()]


def gathered_logits() -> str:
    """Issue 7452, finding 2: logits of the whole vocabulary are taken for one shard of it."""
    right = torch.nn.functional.cross_entropy(torch.arange(4.0), torch.tensor(3)).item()
    loss, gradient = on_ranks(2, _loss_of_gathered_logits, tensor_model_parallel_size=2)[0]
    assert loss - right > 0.5, f"loss {loss}, expected {right}"
    return f"loss {loss:.3f} in place of {right:.3f}, gradient {gradient}"
