"""The training objectives of phase 1: multi-hot cross-entropy and the published ablations.

The ablations are written with differentiable operations: clear rather than fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_tst.ops.collectives import (
    all_reduce_max_,
    copy_to_tensor_parallel,
    group_size,
    reduce_from_tensor_parallel,
)
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.targets import (
    IGNORE_INDEX,
    TargetWeights,
    as_ids,
    as_weights,
    bag_coefficients,
    to_local_targets,
    validate_targets,
)
from megatron_tst.settings.config import OBJECTIVES


def superposition_loss(
    logits: Tensor,
    target_bags: Tensor,
    objective: str = "mce",
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Loss of each latent position under one of the objectives of ``--tst-objective``.

    Args:
        logits: [..., v], this rank's vocabulary shard; never modified.
        target_bags: [..., s] integers, global token ids.
        objective: a key of :data:`LOSSES`.
        target_weights: [s] numbers or a tensor, or ``None``; ``bce`` and ``hinge`` take none, their
            targets are a set.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        ignore_index: target id that does not count.

    Returns:
        [...] in float32 (float64 for float64 logits); 0 with zero gradient for a bag without a
        counting target.

    Raises:
        ValueError: unknown objective, weights that it does not take, or targets that do not fit.

    Source: arXiv 2605.06546, loss ablations.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: choose one of {', '.join(OBJECTIVES)}.")
    if OBJECTIVES[objective].takes_weights:
        return LOSSES[objective](logits, target_bags, target_weights, tp_group, ignore_index)
    if target_weights is not None:
        raise ValueError(
            f"objective {objective!r} got target_weights, and its targets are a set: pass None."
        )
    return LOSSES[objective](logits, target_bags, tp_group, ignore_index)


def summed_probability_loss(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """``mce-sum``: ``-log(sum_i w_i p(y_i) / sum_i w_i)``, the weighted mean probability of a bag.

    With uniform weights this is the paper's "-log of the summed probability" plus the constant
    log s, so that it equals the cross-entropy at s = 1. A token that occurs twice counts twice.

    Two all-reduces: one number a position, then 1 + s. Arguments, result, dtypes and errors are
    those of :func:`~megatron_tst.ops.cross_entropy.multi_hot_cross_entropy`.
    """
    weights, target_bags = as_weights(target_weights), as_ids("target_bags", target_bags)
    validate_targets(logits.shape, target_bags, weights, tp_group, ignore_index)
    wide = _widen(logits)
    coefficients, live = bag_coefficients(target_bags, weights, ignore_index, wide.dtype)
    maximum = all_reduce_max_(wide.detach().amax(-1, keepdim=True), tp_group)
    partial_sum = (wide - maximum).exp().sum(-1, keepdim=True)
    own_targets = _own_target_logits(wide - maximum, target_bags, coefficients > 0, tp_group)
    merged = reduce_from_tensor_parallel(torch.cat((partial_sum, own_targets), -1), tp_group)
    log_sum, relative = merged[..., 0].log(), merged[..., 1:]
    # log 0 = -inf drops a target from the log-sum-exp; a dead bag would be left with nothing but
    # -inf, whose gradient is NaN, so it keeps arbitrary terms until its loss is masked.
    log_coefficients = coefficients.log().masked_fill(~live.unsqueeze(-1), 0)
    loss = log_sum - torch.logsumexp(relative + log_coefficients, -1)
    return loss.masked_fill(~live, 0)


def multi_label_bce(
    logits: Tensor,
    target_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """``bce``: binary cross-entropy of every vocabulary entry against "is it in the bag".

    ``sum_v [log(1 + exp(z_v)) - z_v * (v in Y)] / |Y|`` with Y the set of valid targets. Divided
    by |Y| and not by V, so that its scale stays that of a cross-entropy. One all-reduce of one
    number a position. Arguments, result, dtypes and errors are those of
    :func:`~megatron_tst.ops.cross_entropy.multi_hot_cross_entropy`.
    """
    target_bags = as_ids("target_bags", target_bags)
    validate_targets(logits.shape, target_bags, None, tp_group, ignore_index)
    targets, distinct = _distinct_targets(target_bags, ignore_index)
    wide = _widen(logits)
    own_targets = _own_target_logits(wide, targets, distinct, tp_group)
    # -logsigmoid(-z) is log(1 + exp(z)) without overflow, and without softplus's cut-off.
    partial = -F.logsigmoid(-wide).sum(-1) - own_targets.sum(-1)
    count = distinct.sum(-1)
    loss = reduce_from_tensor_parallel(partial, tp_group) / count.clamp(min=1)
    return loss.masked_fill(count == 0, 0)


def multi_label_hinge(
    logits: Tensor,
    target_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """``hinge``: every target should beat every other vocabulary entry by a margin of 1.

    ``sum_{y in Y, v not in Y} max(0, 1 - z_y + z_v) / V`` with Y the set of valid targets, as
    ``torch.nn.functional.multilabel_margin_loss``. Targets are taken one at a time and recomputed
    in the backward, so that memory does not grow with s. Two all-reduces, of s numbers and of one
    number a position, and one of s in the backward. Arguments, result, dtypes and errors are those
    of :func:`~megatron_tst.ops.cross_entropy.multi_hot_cross_entropy`.
    """
    target_bags = as_ids("target_bags", target_bags)
    validate_targets(logits.shape, target_bags, None, tp_group, ignore_index)
    targets, distinct = _distinct_targets(target_bags, ignore_index)
    wide = _widen(logits)
    own_targets = _own_target_logits(wide, targets, distinct, tp_group)
    # Every rank compares every target with its own shard: their gradient is a sum over ranks.
    target_logits = copy_to_tensor_parallel(
        reduce_from_tensor_parallel(own_targets, tp_group), tp_group
    )
    others = wide.masked_fill(_is_target(wide, targets, distinct, tp_group), -torch.inf)
    partial = torch.zeros_like(wide[..., 0])
    for offset in range(targets.shape[-1]):
        # Not unbind: torch.compile cannot recompute from one of several results.
        target_logit = target_logits[..., offset]
        excess = checkpoint(
            _margin_excess, others, target_logit, use_reentrant=False, preserve_rng_state=False
        )
        partial = partial + excess.masked_fill(~distinct[..., offset], 0)
    vocabulary_size = logits.shape[-1] * group_size(tp_group)
    return reduce_from_tensor_parallel(partial, tp_group) / vocabulary_size


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mce": multi_hot_cross_entropy,
    "mce-sum": summed_probability_loss,
    "bce": multi_label_bce,
    "hinge": multi_label_hinge,
}
"""By the name that :data:`megatron_tst.settings.config.OBJECTIVES` has."""


def _margin_excess(others: Tensor, target_logit: Tensor) -> Tensor:
    return F.relu(1 - target_logit.unsqueeze(-1) + others).sum(-1)


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _distinct_targets(target_bags: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The bag sorted, and the first occurrence of each valid target in it."""
    ordered = target_bags.sort(-1).values
    distinct = ordered != ignore_index
    distinct[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    return ordered, distinct


def _own_target_logits(
    logits: Tensor, targets: Tensor, counts: Tensor, tp_group: ProcessGroup | None
) -> Tensor:
    """Logits of the targets that count and lie in this rank's shard, else 0: [..., s]."""
    local, inside = to_local_targets(targets, counts, logits.shape[-1], tp_group)
    return logits.gather(-1, local).masked_fill(~inside, 0)


def _is_target(
    logits: Tensor, targets: Tensor, counts: Tensor, tp_group: ProcessGroup | None
) -> Tensor:
    """Which entries of this rank's shard are in the bag: [..., v] bool."""
    local, inside = to_local_targets(targets, counts, logits.shape[-1], tp_group)
    hits = torch.zeros_like(logits, dtype=torch.uint8)
    return hits.scatter_add_(-1, local, inside.to(torch.uint8)).bool()
