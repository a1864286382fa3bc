"""The losses of megatron-core."""

from __future__ import annotations

from types import SimpleNamespace

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


def packed_targets_of_mtp() -> str:
    """PR 6205: the targets of multi-token prediction are shifted at unpadded boundaries."""
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    # Two documents of 3 tokens, each padded to 4: 1 2 3 0 and 5 6 7 0.
    packed = SimpleNamespace(
        cu_seqlens_q=torch.tensor([0, 3, 6]), cu_seqlens_q_padded=torch.tensor([0, 4, 8])
    )
    text = torch.tensor([[1, 2, 3, 0, 5, 6, 7, 0]])
    rolled = roll_tensor(text, shifts=-1, dims=-1, packed_seq_params=packed)[0].tolist()[0]
    right = [2, 3, 0, 0, 6, 7, 0, 0]
    assert rolled != right, "mended"
    return f"next tokens {rolled} in place of {right}"
