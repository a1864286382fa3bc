"""Bag embedding: the mean of the embeddings of the s tokens folded into one latent position."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.model.collectives import (
    group_size,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    vocabulary_start,
)
from megatron_tst.model.kernels.launch import Implementation, uses_triton

# Sums of so many elements stay in a core's cache.
_ELEMENTS_AT_ONCE = 1 << 17


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
        implementation: ``torch``, ``triton``, or ``auto``: Triton on CUDA, where it is installed.

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
        function = _FusedBagMean if uses_triton(implementation, weight_shard) else _BagMean
        partial = function.apply(weight_shard, local_ids, outside, sizes)
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
        raise ValueError(
            f"latent length {token_bags.shape[1]} is not divisible by the tensor-parallel size "
            f"{tp_size}: sequence parallelism needs equal slices; change --seq-length."
        )
    if token_bags.device.type == "cpu" and token_bags.numel():
        vocabulary_size = weight_shard.shape[0] * tp_size
        present = token_bags if is_absent is None else token_bags.masked_fill(is_absent, 0)
        lowest, highest = (int(bound) for bound in present.aminmax())
        if lowest < 0 or highest >= vocabulary_size:
            raise ValueError(
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


class _BagMean(torch.autograd.Function):
    """Mean over the bag of this rank's rows: [v, h], [b, l, s] -> [b, l, h]; no collective."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        rows = bags.reshape(-1, bags.shape[-1])
        result = weight.new_empty(len(rows), weight.shape[1])
        # A GPU takes all at once; in a CPU's cache rows and their sums, both wide, are to stay.
        chunk = len(rows) if weight.is_cuda else _ELEMENTS_AT_ONCE // (2 * weight.shape[1])
        chunk = max(chunk, 1)
        for first in range(0, len(rows), chunk):
            part = slice(first, first + chunk)
            absent = None if outside is None else outside.reshape(rows.shape)[part]
            divisor = bags.shape[-1] if sizes is None else sizes.reshape(-1, 1)[part]
            result[part] = _sum_rows(weight, rows[part], absent).div_(divisor)
        ctx.save_for_backward(bags, outside, sizes)
        ctx.shard_size = weight.shape[0]
        return result.view(*bags.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        bags, outside, sizes = ctx.saved_tensors
        bag_size = bags.shape[-1]
        divisor = bag_size if sizes is None else sizes
        share = grad_output.to(_accumulation_dtype(grad_output)).div(divisor).flatten(0, -2)
        bags = bags.reshape(-1, bag_size)
        outside = None if outside is None else outside.reshape(-1, bag_size, 1)
        grad = _sum_into_rows(share, bags, outside, ctx.shard_size, grad_output.dtype)
        return grad, None, None, None


class _FusedBagMean(torch.autograd.Function):
    """As ``_BagMean``, by Triton kernels: one pass over the rows of a bag each way."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        from megatron_tst.model.kernels.bag_embedding import bag_mean

        rows = bags.reshape(-1, bags.shape[-1])
        absent = None if outside is None else outside.reshape(rows.shape)
        divisors = None if sizes is None else sizes.flatten().float()
        ctx.save_for_backward(rows, absent, divisors)
        ctx.shard_size = weight.shape[0]
        return bag_mean(weight, rows, absent, divisors).view(*bags.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        from megatron_tst.model.kernels.bag_embedding import bag_mean_backward

        rows, absent, divisors = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        return bag_mean_backward(grad, rows, absent, divisors, ctx.shard_size), None, None, None


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum_rows(weight: Tensor, bags: Tensor, outside: Tensor | None) -> Tensor:
    """Sum of the rows of each bag, in the accumulation dtype: [v, h], [n, s] -> [n, h]."""
    rows = weight.new_empty(len(bags), weight.shape[1])
    # Widened by itself: a sum of two dtypes takes longer than a copy and a sum of one.
    total = wide = rows.to(_accumulation_dtype(weight))
    for offset, column in enumerate(bags.t().contiguous()):
        torch.index_select(weight, 0, column, out=rows)
        if outside is not None:
            rows.masked_fill_(outside[:, offset].unsqueeze(-1), 0)
        wide.copy_(rows)
        total = total.add_(wide) if offset else wide.clone()
    return total


def _sum_into_rows(
    share: Tensor, bags: Tensor, outside: Tensor | None, shard_size: int, dtype: torch.dtype
) -> Tensor:
    """Add ``share[n]`` to the row of each token of bag n: [n, h], [n, s] -> [v, h] in ``dtype``."""
    if share.is_cuda:
        return _sum_by_offset(share, bags, outside, shard_size).to(dtype)
    # Sorted by token, the shares of a row lie together and are summed before they are rounded: no
    # wide accumulator for the whole shard. On a GPU the number of rows would have to be waited for.
    # Offset by offset within a row, the order of the GPU.
    places = torch.arange(bags.numel())
    if outside is not None:
        places = places[~outside.squeeze(-1).t().flatten()]
    tokens, order = bags.t().flatten()[places].sort(stable=True)
    bag_of_place = places[order] % len(bags)
    rows, bounds = _segments(tokens, shard_size)
    new = share.new_empty if rows is None else share.new_zeros
    grad = new(shard_size, share.shape[1], dtype=dtype)
    chunk = max(_ELEMENTS_AT_ONCE // share.shape[1], 1)
    cuts = [*bounds[:-1:chunk].tolist(), len(tokens)]
    for index, (start, stop) in enumerate(pairwise(cuts)):
        part = slice(index * chunk, (index + 1) * chunk)
        offsets = bounds[:-1][part] - start
        sums = F.embedding_bag(bag_of_place[start:stop], share, offsets, mode="sum")
        if rows is None:
            grad[part] = sums
        else:
            grad.index_copy_(0, rows[part], sums.to(dtype))
    return grad


def _segments(tokens: Tensor, shard_size: int) -> tuple[Tensor | None, Tensor]:
    """The rows that sorted tokens have, None for all, and where the tokens of each begin and end.

    With as many tokens as rows it is faster to write all rows in order than some by their numbers.
    """
    if len(tokens) >= shard_size:
        return None, torch.searchsorted(tokens, torch.arange(shard_size + 1))
    rows, counts = torch.unique_consecutive(tokens, return_counts=True)
    return rows, F.pad(counts.cumsum(0), (1, 0))


def _sum_by_offset(share: Tensor, bags: Tensor, outside: Tensor | None, shard_size: int) -> Tensor:
    """[n, h], [n, s] -> [v, h], in a fixed order: it sorts, where index_add_ uses atomics."""
    total = share.new_zeros(shard_size, share.shape[1])
    for offset in range(bags.shape[1]):
        addend = share if outside is None else share.masked_fill(outside[:, offset], 0)
        total.index_put_((bags[:, offset],), addend, accumulate=True)
    return total
