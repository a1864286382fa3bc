"""Targets of bags: what they may be, their shares in the loss, and where a shard has them.

What depends on values is checked on the CPU only, as it would stall a GPU, and not while
``torch.compile`` traces: the operators of ``megatron_tst.ops.compiled`` check it where they run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.collectives import group_size, vocabulary_start

IGNORE_INDEX = -100
"""Target that does not count."""


TargetWeights = Sequence[float] | Tensor
"""Weights of the targets of a bag by offset, [s]: finite, at least 0."""


def as_weights(target_weights: TargetWeights | None) -> Tensor | None:
    """The weights as a tensor.

    Raises:
        ValueError: they are no finite numbers of at least 0, one an offset.
    """
    if target_weights is None:
        return None
    if isinstance(target_weights, Tensor):
        weights = target_weights
    else:
        try:
            weights = torch.as_tensor(target_weights, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise _bad_weights(target_weights) from error
    if torch.compiler.is_compiling() or weights.device.type != "cpu":
        return weights
    if weights.dim() != 1 or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise _bad_weights(target_weights)
    return weights


def _bad_weights(weights: object) -> ValueError:
    return ValueError(
        f"target_weights is {weights!r}: pass one weight an offset, finite and at least 0."
    )


def as_ids(name: str, ids: Tensor) -> Tensor:
    """Token ids as int64.

    Raises:
        ValueError: they are of no integer type.
    """
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} has dtype {ids.dtype}: pass token ids, which are integers.")
    return ids.long()


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
    if not torch.compiler.is_compiling():
        validate_target_values(target_bags, vocabulary_size, ignore_index)


def validate_target_values(targets: Tensor, vocabulary_size: int, ignore_index: int) -> None:
    """Refuse targets outside the vocabulary, on the CPU.

    Raises:
        ValueError: naming the target, and the vocabulary size or the ignore index.
    """
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in targets.aminmax())
    if lowest >= 0 and highest < vocabulary_size:
        return
    foreign = ((targets < 0) | (targets >= vocabulary_size)) & (targets != ignore_index)
    if not bool(foreign.any()):
        return
    target = int(targets[foreign][0])
    remedy = (
        f"pass ignore_index={target} if it stands for no target."
        if target < 0
        else "the data and the model use different tokenizers, or the logits are not this rank's "
        "shard."
    )
    raise UsageError(
        f"target {target} lies outside the padded vocabulary of {vocabulary_size} and is not the "
        f"ignore_index, {ignore_index}: {remedy}"
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
