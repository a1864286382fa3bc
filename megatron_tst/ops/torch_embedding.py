"""The mean of the embeddings of bags of tokens by torch's operators, and its gradient."""

from __future__ import annotations

import functools
import warnings
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sums of so many elements stay in a core's cache.
_ELEMENTS_AT_ONCE = 1 << 17


class SparseBagMean(torch.autograd.Function):
    """The mean of bags of a power of two on a CPU, as products of a sparse matrix.

    Every dtype has 1/s then, so that the product, which accumulates in the wider dtype and rounds
    once, has the bits of ``BagMean`` unless a sum over- or underflows; no row is stored widened.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: None
    ) -> Tensor:
        """[v, h], [b, l, s] rows of the shard and whether they are another's -> [b, l, h]."""
        ctx.save_for_backward(bags, outside, sizes)
        ctx.shard_size = weight.shape[0]
        tokens, bag_size = bags.flatten(), bags.shape[-1]
        if outside is None:
            bounds = torch.arange(0, len(tokens) + 1, bag_size)
        else:
            inside = ~outside.flatten()
            tokens = tokens[inside]
            bounds = _bounds(inside.view(-1, bag_size).sum(-1))
        result = _scaled_sums(weight, bounds, tokens, 1 / bag_size)
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """[b, l, h] -> [v, h]."""
        bags, outside, _ = ctx.saved_tensors
        bag_size = bags.shape[-1]
        outside = None if outside is None else outside.reshape(-1, bag_size)
        tokens, bag_of_token = _sorted_tokens(bags.reshape(-1, bag_size), outside)
        bounds = _bounds(torch.bincount(tokens, minlength=ctx.shard_size))
        grad = grad_output.flatten(0, -2)
        return _scaled_sums(grad, bounds, bag_of_token, 1 / bag_size), None, None, None


class BagMean(torch.autograd.Function):
    """The mean of any bags, on any device."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """As ``SparseBagMean``; ``sizes``, [b, l, 1]: tokens of a bag, None where all have s."""
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
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """[b, l, h] -> [v, h]."""
        bags, outside, sizes = ctx.saved_tensors
        bag_size = bags.shape[-1]
        divisor = bag_size if sizes is None else sizes
        share = grad_output.to(_accumulation_dtype(grad_output)).div(divisor).flatten(0, -2)
        bags = bags.reshape(-1, bag_size)
        outside = None if outside is None else outside.reshape(-1, bag_size)
        grad = sum_into_rows(share, bags, outside, ctx.shard_size, grad_output.dtype)
        return grad, None, None, None


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


def sum_into_rows(
    share: Tensor, bags: Tensor, outside: Tensor | None, shard_size: int, dtype: torch.dtype
) -> Tensor:
    """Add ``share[n]`` to the row of each token of bag n: [n, h], [n, s] -> [v, h] in ``dtype``."""
    if share.is_cuda:
        return sum_by_offset(share, bags, outside, shard_size).to(dtype)
    # Sorted by token, the shares of a row lie together and are summed before they are rounded: no
    # wide accumulator for the whole shard. On a GPU the number of rows would have to be waited for.
    tokens, bag_of_place = _sorted_tokens(bags, outside)
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


def _sorted_tokens(bags: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of this shard in ascending order, [k], and the bag of each: [n, s], [n, s] or None.

    Offset by offset within a token, the order of the GPU.
    """
    tokens = bags.t().flatten()
    if outside is None:
        tokens, places = tokens.sort(stable=True)
    else:
        inside = (~outside.t().flatten()).nonzero().squeeze(-1)
        tokens, order = tokens[inside].sort(stable=True)
        places = inside[order]
    return tokens, places.remainder_(len(bags))


def _scaled_sums(rows: Tensor, bounds: Tensor, chosen: Tensor, factor: float) -> Tensor:
    """``factor`` times the sum of ``rows[chosen[bounds[i] : bounds[i + 1]]]`` for every i.

    [n, h], [m + 1], [k] -> [m, h] in the dtype of the rows, added up in at least float32, in order.
    """
    _silence_beta_warning()
    factors = rows.new_full((len(chosen),), factor)
    shape = (len(bounds) - 1, len(rows))
    # bag_embedding validates the ids.
    matrix = torch.sparse_csr_tensor(bounds, chosen, factors, shape, check_invariants=False)
    return torch.sparse.mm(matrix, rows, "sum")


@functools.cache
def _silence_beta_warning() -> None:
    """Has torch say here, where nobody sees it, what it says once: CSR tensors are in beta."""
    zero = torch.zeros(1, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(zero, zero[:0], zero[:0], (0, 0), check_invariants=False)


def _bounds(counts: Tensor) -> Tensor:
    """Where segments of so many elements begin and end: [m] -> [m + 1]."""
    return F.pad(counts.cumsum(0), (1, 0))


def _segments(tokens: Tensor, shard_size: int) -> tuple[Tensor | None, Tensor]:
    """The rows that sorted tokens have, None for all, and where the tokens of each begin and end.

    With as many tokens as rows it is faster to write all rows in order than some by their numbers.
    """
    if len(tokens) >= shard_size:
        return None, torch.searchsorted(tokens, torch.arange(shard_size + 1))
    rows, counts = torch.unique_consecutive(tokens, return_counts=True)
    return rows, _bounds(counts)


def sum_by_offset(share: Tensor, bags: Tensor, outside: Tensor | None, shard_size: int) -> Tensor:
    """[n, h], [n, s] -> [v, h], in a fixed order: it sorts, where index_add_ uses atomics."""
    total = share.new_zeros(shard_size, share.shape[1])
    for offset in range(bags.shape[1]):
        addend = share if outside is None else share.masked_fill(outside[:, offset, None], 0)
        total.index_put_((bags[:, offset],), addend, accumulate=True)
    return total
