"""Targets of bags: what they may be, their shares in the loss, and where a shard has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.collectives import group_size, vocabulary_start

IGNORE_INDEX = -100
"""Target that does not count."""


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
            raise UsageError(
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
