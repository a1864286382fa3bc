"""Multi-hot cross-entropy over vocabulary-parallel logits: one pass for all targets of a bag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.model.collectives import (
    all_reduce_max_,
    all_reduce_sum_,
    group_size,
    vocabulary_start,
)

IGNORE_INDEX = -100

# Rows are processed in chunks of about this many logits, so that the wide copy of a chunk stays
# in a CPU's second-level cache, or costs a GPU 256 MB instead of a copy of all logits.
_CHUNK_ELEMENTS_CPU = 1 << 18
_CHUNK_ELEMENTS_GPU = 1 << 26


def multi_hot_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    reuse_logits: bool = False,
) -> Tensor:
    """Weighted mean of the cross-entropies of a bag of targets, sharing one log-sum-exp.

    ``logsumexp(z) - sum_i w_i z[y_i] / sum_i w_i`` over the targets that are not ignored, with
    gradient ``softmax(z) - sum_i w_i onehot(y_i) / sum_i w_i``. A token that occurs twice counts
    twice. A bag without a target of positive weight has loss 0 and gradient 0.

    Exactly two all-reduces, whatever s: one number a position for the maximum, then two (sum of
    exponentials, weighted target logit). Statistics are float32 (float64 for float64 logits).
    The logits are what is saved for the backward, which recomputes the exponentials chunk by chunk,
    unless all fit one chunk and are kept. The forward does not modify them, and neither does the
    backward unless it may reuse them. At s = 1 loss and gradient
    have the bits of the host's unfused ``vocab_parallel_cross_entropy`` (one or two ranks; with
    more, the order of the ranks' sums is up to the collective).

    On CUDA the gradients of repeated tokens of unequal weight are added in no fixed order, unless
    ``torch.use_deterministic_algorithms(True)`` is set (Megatron's ``--deterministic-mode``).

    Args:
        logits: [..., v], this rank's contiguous vocabulary shard; padded rows take part in the
            softmax, as in the host. Layouts whose leading dimensions cannot be merged are copied.
        target_bags: [..., s] int64 global token ids, the same on every rank of the group.
        target_weights: [s], not negative; ``None`` means uniform.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        ignore_index: target id that does not count.
        reuse_logits: the backward may overwrite the logits with their gradient, which then takes no
            memory of its own. For logits that nobody reads after this loss, such as those of an
            output layer; the graph can be used once.

    Returns:
        [...] loss a position, float32 (float64 for float64 logits), the same on every rank.

    Raises:
        ValueError: shapes do not fit, or (checked on the CPU only, as it would stall a GPU) a
            target lies outside the vocabulary.

    Source: arXiv 2605.06546, multi-hot cross-entropy.
    """
    loss, _ = _multi_hot_cross_entropy(
        logits, target_bags, target_weights, tp_group, ignore_index, reuse_logits, by_offset=False
    )
    return loss


def multi_hot_cross_entropy_by_offset(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`multi_hot_cross_entropy`, and those of each target without a gradient.

    The latter cost no pass over the logits, and one more all-reduce, of s numbers a position.

    Returns:
        The loss, and what :func:`per_target_cross_entropy` returns.
    """
    loss, by_offset = _multi_hot_cross_entropy(
        logits, target_bags, target_weights, tp_group, ignore_index, reuse_logits, by_offset=True
    )
    assert by_offset is not None
    return loss, by_offset


def _multi_hot_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: Tensor | None,
    tp_group: ProcessGroup | None,
    ignore_index: int,
    reuse_logits: bool,
    by_offset: bool,
) -> tuple[Tensor, Tensor | None]:
    validate_targets(logits.shape, target_bags, target_weights, tp_group, ignore_index)
    loss, offset_losses = _MultiHotCrossEntropy.apply(
        logits.reshape(-1, logits.shape[-1]),
        target_bags.reshape(-1, target_bags.shape[-1]),
        target_weights,
        tp_group,
        ignore_index,
        reuse_logits,
        by_offset,
    )
    if offset_losses is not None:
        offset_losses = offset_losses.view(target_bags.shape)
    return loss.view(logits.shape[:-1]), offset_losses


@torch.no_grad()
def per_target_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The s ordinary cross-entropies of each bag, for logging the loss by offset; no gradient.

    Three all-reduces: of one, of two and of s numbers a position. Arguments and errors are those
    of :func:`multi_hot_cross_entropy`.

    Returns:
        [..., s] in float32 (float64 for float64 logits), the same on every rank. Ignored targets
        are 0: leave them out of a mean by counting ``target_bags != ignore_index``.
    """
    return multi_hot_cross_entropy_by_offset(logits, target_bags, None, tp_group, ignore_index)[1]


def validate_targets(
    logits_shape: Sequence[int],
    target_bags: Tensor,
    target_weights: Tensor | None,
    tp_group: ProcessGroup | None,
    ignore_index: int,
) -> None:
    """Refuse shapes that do not fit and, on the CPU, targets outside the vocabulary.

    Raises:
        ValueError: naming the shapes, or the target and the vocabulary size.
    """
    positions, vocabulary_size = tuple(logits_shape[:-1]), logits_shape[-1] * group_size(tp_group)
    if target_bags.shape[:-1] != positions or target_bags.shape[-1:] in ((), (0,)):
        raise ValueError(
            f"target_bags {tuple(target_bags.shape)} do not fit logits {tuple(logits_shape)}: "
            "pass targets [..., s], s >= 1, for logits [..., v] with the same leading dimensions."
        )
    if target_weights is not None and target_weights.shape != target_bags.shape[-1:]:
        raise ValueError(
            f"target_weights {tuple(target_weights.shape)} do not fit bags of "
            f"{target_bags.shape[-1]} targets: pass one weight an offset, [s]."
        )
    if target_bags.device.type != "cpu" or target_bags.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in target_bags.aminmax())
    if lowest < 0 or highest >= vocabulary_size:
        foreign = (target_bags < 0) | (target_bags >= vocabulary_size)
        foreign &= target_bags != ignore_index
        if bool(foreign.any()):
            raise ValueError(
                f"target {int(target_bags[foreign][0])} lies outside the padded vocabulary of "
                f"{vocabulary_size} and is not the ignore index {ignore_index}: the data and the "
                "model use different tokenizers, or the logits are not this rank's shard."
            )


def bag_coefficients(
    target_bags: Tensor, target_weights: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Share of each target in its bag, ``w_i / sum w`` over the targets that are not ignored.

    Returns:
        Coefficients [..., s], zero for ignored targets, and [...] whether their sum is positive;
        where it is not, all coefficients of the bag are zero.
    """
    weights = (target_bags != ignore_index).to(dtype)
    if target_weights is not None:
        weights *= target_weights.to(device=weights.device, dtype=dtype)
    total = weights.sum(-1, keepdim=True)
    live = total > 0
    return weights.div_(total.masked_fill_(~live, 1)), live.squeeze(-1)


def to_local_targets(
    target_bags: Tensor, valid: Tensor, shard_size: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard (0 where there is none), and where there is one.

    Targets that are not ``valid`` are in no shard.
    """
    shifted = target_bags - vocabulary_start(shard_size, tp_group)
    inside = (shifted >= 0) & (shifted < shard_size) & valid
    return shifted.masked_fill_(~inside, 0), inside


class _MultiHotCrossEntropy(torch.autograd.Function):
    """[n, v], [n, s] -> [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        target_weights: Tensor | None,
        tp_group: ProcessGroup | None,
        ignore_index: int,
        reuse_logits: bool,
        by_offset: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # 1. Share of each target, zero on the ranks that do not hold it.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        coefficients, live = bag_coefficients(targets, target_weights, ignore_index, dtype)
        local, inside = to_local_targets(targets, coefficients > 0, logits.shape[-1], tp_group)
        coefficients.masked_fill_(~inside, 0)
        # 2. First all-reduce.
        maximum = _global_maximum(logits, tp_group)
        # 3. Second all-reduce: sum of exponentials and weighted target logit. A masked target may
        # point at a logit of -inf, hence the fill: 0 * -inf is not 0.
        relative = logits.gather(-1, local).to(dtype).sub_(maximum.unsqueeze(-1))
        target_logit = relative.masked_fill_(~inside, 0).mul_(coefficients).sum(-1)
        sums, exponentials = _sum_exponentials(logits, maximum, keep=True)
        statistics = all_reduce_sum_(torch.stack((sums, target_logit)), tp_group)
        ctx.save_for_backward(
            logits, local, coefficients, live, maximum, statistics[0], exponentials
        )
        ctx.reuse_logits = reuse_logits
        log_sum = statistics[0].log()
        loss = (log_sum - statistics[1]).masked_fill_(~live, 0)
        if not by_offset:
            return loss, None
        # Targets without weight have no part in the loss, but one of their own.
        valid = targets != ignore_index
        local, inside = to_local_targets(targets, valid, logits.shape[-1], tp_group)
        relative = logits.gather(-1, local).to(dtype).sub_(maximum.unsqueeze(-1))
        relative = all_reduce_sum_(relative.masked_fill_(~inside, 0), tp_group)
        offset_losses = (log_sum.unsqueeze(-1) - relative).masked_fill_(~valid, 0)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, local, coefficients, live, maximum, sums, exponentials = ctx.saved_tensors
        # Each chunk is read before it is written.
        grad = logits if ctx.reuse_logits else _contiguous_like(logits)
        scale = grad_output.masked_fill(~live, 0).unsqueeze(-1)
        chunks = _chunks(
            logits, grad, maximum.unsqueeze(-1), sums.unsqueeze(-1), local, -coefficients, scale
        )
        scratch = _scratch(logits, sums.dtype)
        for chunk, out, chunk_max, chunk_sum, columns, negated, chunk_scale in chunks:
            # A narrow gradient is computed in the wide scratch and cast once, at the end.
            wide = out if out.dtype == sums.dtype else scratch[: chunk.shape[0]]
            if exponentials is None:
                wide.copy_(chunk).sub_(chunk_max).exp_().div_(chunk_sum)
            else:
                torch.div(exponentials, chunk_sum, out=wide)
            wide.scatter_add_(-1, columns, negated).mul_(chunk_scale)
            if wide is not out:
                out.copy_(wide)
        return grad, None, None, None, None, None, None


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _rows_per_chunk(logits: Tensor) -> int:
    is_cpu = logits.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_CPU if is_cpu else _CHUNK_ELEMENTS_GPU
    return min(max(1, elements // logits.shape[-1]), max(1, logits.shape[0]))


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching row chunks of [n, ...] tensors, sized by the logits."""
    rows = _rows_per_chunk(logits)
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one chunk in the statistics' dtype."""
    return logits.new_empty(_rows_per_chunk(logits), logits.shape[-1], dtype=dtype)


def _global_maximum(logits: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Row maximum over the whole vocabulary, in the statistics' dtype: [n, v] -> [n]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return all_reduce_max_(logits.amax(-1).to(dtype), tp_group)


def _sum_exponentials(logits: Tensor, maximum: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """This rank's ``sum_v exp(z_v - max)``: [n, v], [n] -> [n].

    Also returns the exponentials [n, v] if they are to be kept and fit one chunk.
    """
    sums = torch.empty_like(maximum)
    wide = None
    for wide, rows in exponentials(logits, maximum):
        torch.sum(wide, -1, out=sums[rows])
    return sums, wide if keep and wide is not None and len(wide) == len(logits) else None


def exponentials(logits: Tensor, shift: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """``exp(z - shift)`` of some rows at a time, in the dtype of the shift and in one buffer.

    Args:
        logits: [n, v].
        shift: [n].

    Yields:
        [rows, v], to be overwritten at will, and which rows they are.
    """
    scratch = _scratch(logits, shift.dtype)
    for first in range(0, len(logits), len(scratch)):
        rows = slice(first, first + len(scratch))
        chunk = logits[rows]
        yield scratch[: len(chunk)].copy_(chunk).sub_(shift[rows].unsqueeze(-1)).exp_(), rows
