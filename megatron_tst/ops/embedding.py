"""Bag embedding: the mean of the embeddings of the s tokens folded into one latent position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.collectives import (
    group_size,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    vocabulary_start,
)
from megatron_tst.ops.kernels.launch import Implementation, uses_triton
from megatron_tst.ops.native_embedding import NativeBagMean, uses_native
from megatron_tst.ops.torch_embedding import BagMean, SparseBagMean


def bag_embedding(
    weight_shard: Tensor,
    token_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Average the embeddings of each bag: ``e'[b, j] = (1/s) * sum_i E[token_bags[b, j, i]]``.

    Each rank averages its own vocabulary rows, accumulating in float32 (float64 for a float64
    weight), casts to the weight's dtype, and then takes part in exactly one collective: an
    all-reduce of [b, l, h], or a reduce-scatter of [l, b, h] along l. Its size does not depend on
    s, and no [b, l, s, h] tensor is ever built.

    The weight gradient adds ``grad / s`` once for each occurrence of a token, in the same
    accumulation dtype and in a fixed order, so that it is reproducible bit for bit. A bag size
    of 1 gives the bits of the host's embedding, whose kernel accumulates gradients its own way.

    Args:
        weight_shard: [v, h], this rank's contiguous vocabulary rows.
        token_bags: [b, l, s] int64 global token ids, the same on every rank of the group.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        sequence_parallel: return this rank's slice of the latent positions.
        ignore_index: negative id of places that hold no token; the mean is that of the others, and
            zero where a bag has no others. ``None`` when every place holds one.
        implementation: ``torch``, ``triton``, or ``auto``: Triton on CUDA, where it is installed;
            the kernels of ``megatron_tst.ops.native`` on a CPU, where they can be compiled.

    Returns:
        [b, l, h] in the weight's dtype, the same on every rank; under sequence parallelism
        [l / tp, b, h], local to the rank.

    Raises:
        ValueError: wrong shapes, l not divisible by the group size under sequence parallelism,
            or (checked on the CPU only, as it would stall a GPU) an id outside the vocabulary.

    Source: arXiv 2605.06546, input superposition; ``VocabParallelEmbedding`` in
    ``megatron/core/tensor_parallel/layers.py`` for the parallel layout.
    """
    is_absent = None if ignore_index is None else token_bags == ignore_index
    _validate(weight_shard, token_bags, is_absent, tp_group, sequence_parallel)
    local_ids, outside = _to_local_ids(token_bags, is_absent, weight_shard.shape[0], tp_group)
    if token_bags.shape[-1] == 1:
        partial = _single_token_embedding(weight_shard, local_ids, outside)
    else:
        sizes = None if is_absent is None else (~is_absent).sum(-1, keepdim=True).clamp_(min=1)
        partial = _bag_mean(weight_shard, local_ids, outside, sizes, implementation)
    if sequence_parallel:
        return reduce_scatter_to_sequence_parallel(partial.transpose(0, 1).contiguous(), tp_group)
    return reduce_from_tensor_parallel(partial, tp_group)


def _validate(
    weight_shard: Tensor,
    token_bags: Tensor,
    is_absent: Tensor | None,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
) -> None:
    if token_bags.dim() != 3 or token_bags.shape[-1] == 0:
        raise ValueError(
            f"token_bags has shape {tuple(token_bags.shape)}: pass [b, l, s] with s >= 1; "
            "plain [b, l] tokens belong to the host's embedding."
        )
    tp_size = group_size(tp_group)
    if sequence_parallel and token_bags.shape[1] % tp_size:
        raise UsageError(
            f"latent length {token_bags.shape[1]} is not divisible by the tensor-parallel size "
            f"{tp_size}: sequence parallelism needs equal slices; change --seq-length."
        )
    if token_bags.device.type == "cpu" and token_bags.numel():
        vocabulary_size = weight_shard.shape[0] * tp_size
        present = token_bags if is_absent is None else token_bags.masked_fill(is_absent, 0)
        lowest, highest = (int(bound) for bound in present.aminmax())
        if lowest < 0 or highest >= vocabulary_size:
            raise UsageError(
                f"token_bags holds ids from {lowest} to {highest}, outside the padded vocabulary "
                f"of {vocabulary_size}: the data and the model use different tokenizers."
            )


def _to_local_ids(
    token_ids: Tensor, is_absent: Tensor | None, shard_size: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Row of each token in this rank's shard, and which places have none."""
    if group_size(tp_group) == 1 and is_absent is None:
        return token_ids, None
    # An id that holds no token is negative, so it is outside of the first shard; of the others too.
    shifted = token_ids - vocabulary_start(shard_size, tp_group)
    outside = (shifted < 0) | (shifted >= shard_size)
    # These tokens add zeros somewhere; spread over the shard they make no hot row, which would
    # serialise the gradient kernel.
    return shifted.remainder_(shard_size), outside


def _single_token_embedding(weight: Tensor, bags: Tensor, outside: Tensor | None) -> Tensor:
    rows = F.embedding(bags.squeeze(-1), weight)
    return rows if outside is None else rows.masked_fill(outside, 0)


def _bag_mean(
    weight: Tensor,
    bags: Tensor,
    outside: Tensor | None,
    sizes: Tensor | None,
    implementation: Implementation,
) -> Tensor:
    """Mean over the bag of this rank's rows: [v, h], [b, l, s] -> [b, l, h]; no collective."""
    mean: Tensor
    if uses_triton(implementation, weight):
        mean = _FusedBagMean.apply(weight, bags, outside, sizes)
    elif uses_native(implementation, weight):
        mean = NativeBagMean.apply(weight, bags, outside, sizes)
    elif weight.device.type == "cpu" and sizes is None and bags.shape[-1].bit_count() == 1:
        mean = SparseBagMean.apply(weight, bags, outside)
    else:
        mean = BagMean.apply(weight, bags, outside, sizes)
    return mean


class _FusedBagMean(torch.autograd.Function):
    """As ``BagMean``, by Triton kernels: one pass over the rows of a bag each way."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        from megatron_tst.ops.kernels.bag_embedding import bag_mean

        rows = bags.reshape(-1, bags.shape[-1])
        absent = None if outside is None else outside.reshape(rows.shape)
        divisors = None if sizes is None else sizes.flatten().float()
        ctx.save_for_backward(rows, absent, divisors)
        ctx.shard_size = weight.shape[0]
        result = bag_mean(weight, rows, absent, divisors)
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        from megatron_tst.ops.kernels.bag_embedding import bag_mean_backward

        rows, absent, divisors = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        return bag_mean_backward(grad, rows, absent, divisors, ctx.shard_size), None, None, None
