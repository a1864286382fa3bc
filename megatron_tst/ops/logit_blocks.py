"""Blocks of the logits of an output layer: products, statistics, and the gradient in their place.

A block holds some positions and the whole vocabulary shard, or all positions and some rows of the
vocabulary. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from megatron_tst.ops.kernels.launch import Implementation, uses_triton
from megatron_tst.ops.native import Products, compiled_kernels, products
from megatron_tst.ops.native_cross_entropy import uses_native
from megatron_tst.ops.torch_cross_entropy import exponentials

Kernels = Literal["triton", "native", "torch"]

# Logits of a block: large enough for efficient products, small beside the activations of a model.
_BLOCK_ELEMENTS_CPU = 1 << 24
_BLOCK_ELEMENTS_GPU = 1 << 27
# Rows and columns of a block are multiples of this, which suits the tiles of a matrix product.
_TILE = 256
# The gradient of the weight is read and written once for each block of positions. With so many in
# one, that takes a small part of the time of its products.
_LEAST_POSITIONS = 512
# Rows of the weight whose gradient stays in a CPU's second-level cache.
_WEIGHT_ELEMENTS_CPU = 1 << 20


def kernels_for(implementation: Implementation, states: Tensor) -> Kernels:
    """What computes with the logits of these hidden states.

    Raises:
        ValueError: ``triton`` where it cannot run.
    """
    if uses_triton(implementation, states):
        return "triton"
    return "native" if uses_native(implementation, states, None) else "torch"


def position_blocks(by: Kernels, states: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Logits [block, v] of some positions at a time, in one buffer, and which they are."""
    n, v = len(states), len(weight)
    step = min(max(_block_elements(states) // v // _TILE * _TILE, _LEAST_POSITIONS), max(n, 1))
    buffer = states.new_empty(step, v)
    for first in range(0, n, step):
        positions = slice(first, min(first + step, n))
        out = buffer[: positions.stop - first]
        yield _logits_of(by, states[positions], weight, out), positions


def vocabulary_blocks(
    by: Kernels, states: Tensor, weight: Tensor
) -> Iterator[tuple[Tensor, slice]]:
    """Logits [n, block] of some rows of the weight at a time, in one buffer, and which they are."""
    n, v = len(states), len(weight)
    step = min(max(_block_elements(states) // max(n, 1) // _TILE * _TILE, _TILE), v)
    buffer = states.new_empty(n * step)
    for first in range(0, v, step):
        rows = slice(first, min(first + step, v))
        out = buffer[: n * (rows.stop - first)].view(n, rows.stop - first)
        yield _logits_of(by, states, weight[rows], out), rows


def _block_elements(states: Tensor) -> int:
    return _BLOCK_ELEMENTS_CPU if states.device.type == "cpu" else _BLOCK_ELEMENTS_GPU


def statistics(
    by: Kernels, logits: Tensor, columns: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a shard contributes to the loss of some positions.

    Args:
        by: kernels.
        logits: [n, v].
        columns: [n, s] of the targets.
        shares: [n, s] of the targets; of those without one the logit has no part.

    Returns:
        [n] each: a shift, such as the maximum, the sum of the exponentials relative to it, and the
        weighted sum of the logits of the targets.
    """
    if by == "triton":
        from megatron_tst.ops.kernels.cross_entropy import shard_statistics

        return shard_statistics(logits, columns, shares)
    # A target without a share may have a logit of -inf.
    own = logits.gather(-1, columns).to(shares.dtype).masked_fill_(shares == 0, 0)
    target_logit = own.mul_(shares).sum(-1)
    if by == "native":
        # Its loss leaves the maximum out of shares that add up to 1, and those of a shard do not.
        _, log_sum_exp = compiled_kernels().multi_hot_loss(logits, columns, shares)
        return log_sum_exp, torch.ones_like(log_sum_exp), target_logit
    maximum = logits.amax(-1).to(shares.dtype)
    sums = torch.empty_like(maximum)
    for wide, rows in exponentials(logits, maximum):
        torch.sum(wide, -1, out=sums[rows])
    return maximum, sums, target_logit


def into_gradient_(
    by: Kernels,
    logits: Tensor,
    columns: Tensor,
    shares: Tensor,
    log_sum_exp: Tensor,
    scale: Tensor,
) -> None:
    """Overwrites logits with ``scale * (softmax - shares of the targets)``.

    Args:
        by: kernels.
        logits: [n, block].
        columns: [n, s] in the block.
        shares: [n, s]; 0 for targets outside of the block.
        log_sum_exp: [n] of the whole vocabulary.
        scale: [n] gradient of the loss of each position.
    """
    if by == "triton":
        from megatron_tst.ops.kernels.cross_entropy import shard_gradient

        shard_gradient(logits, columns, shares, log_sum_exp, scale, out=logits)
    elif by == "native":
        compiled_kernels().multi_hot_gradient(logits, columns, shares, log_sum_exp, scale, logits)
    else:
        negated, scale = -shares, scale.unsqueeze(-1)
        for wide, rows in exponentials(logits, log_sum_exp):
            wide.scatter_add_(-1, columns[rows], negated[rows]).mul_(scale[rows])
            logits[rows] = wide


def columns_in_block(columns: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a block of the vocabulary, 0 for others, and which those are."""
    shifted = columns - rows.start
    outside = (shifted < 0) | (shifted >= rows.stop - rows.start)
    return shifted.masked_fill_(outside, 0), outside


def _logits_of(by: Kernels, states: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    own = _products(by, states, weight, out)
    if own is not None:
        return own.logits_of(states, weight, out)
    return torch.mm(states, weight.t(), out=out)


def add_product_(by: Kernels, sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right`` in the dtype of the sums: [n, h], [n, v], [v, h].

    Products in float32 are added unrounded on a GPU, and on a CPU that ``Products`` serves. torch
    has none for CPUs: there each is rounded once to the dtype of the operands, as the host's.
    """
    own = _products(by, left, right)
    if own is not None and sums.dtype == torch.float32:
        own.add_product_(sums, left, right)
    else:
        _add_product_(sums, left, right)


def add_transposed_product_(by: Kernels, sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left.T @ right`` as :func:`add_product_`: [v, h], [n, v], [n, h]."""
    own = _products(by, left, right)
    if own is not None and sums.dtype == torch.float32:
        own.add_transposed_product_(sums, left, right)
    else:
        _add_product_(sums, left.t(), right)


def _products(by: Kernels, *operands: Tensor) -> Products | None:
    found = products() if by == "native" else None
    return found if found is not None and found.serves(*operands) else None


def _add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif sums.is_cuda and sums.dtype == torch.float32:
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        for rows in _row_blocks(sums):
            sums[rows] += torch.mm(left[rows], right)


def add_scaled_(sums: Tensor, addend: Tensor, factor: Tensor) -> None:
    """``sums += factor * addend`` of [v, h] and one number, without a copy of either."""
    for rows in _row_blocks(sums):
        sums[rows].addcmul_(addend[rows], factor)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * tensor`` of [v, h] and one number, rounded once to a dtype."""
    result = torch.empty_like(tensor, dtype=dtype)
    for rows in _row_blocks(tensor):
        # A number of one element would first be rounded to the dtype of the tensor.
        result[rows] = tensor[rows].to(factor.dtype) * factor
    return result


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    """All rows on a GPU, or as many at a time as stay in a CPU's cache."""
    elements = _WEIGHT_ELEMENTS_CPU if tensor.device.type == "cpu" else tensor.numel()
    step = max(elements // max(tensor.shape[1], 1), 1)
    for first in range(0, len(tensor), step):
        yield slice(first, first + step)
