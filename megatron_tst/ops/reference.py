"""Slow, readable oracles for the numerics: whole vocabulary, one rank, plain torch operations.

They compute in float64 unless told otherwise, are differentiable, and share no code with what they
check. Shapes: weight [V, h], bags [..., s], logits [..., V].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bag_embedding_reference(
    weight: Tensor,
    token_bags: Tensor,
    dtype: torch.dtype = torch.float64,
    ignore_index: int | None = None,
) -> Tensor:
    """Mean of the rows of the tokens of each bag, 0 without any: [V, h], [b, l, s] -> [b, l, h]."""
    present = torch.ones_like(token_bags) if ignore_index is None else token_bags != ignore_index
    counts = present.sum(-1, keepdim=True).clamp(min=1)
    rows = weight.to(dtype)[token_bags.where(present.bool(), 0)]
    return (rows * present.unsqueeze(-1)).sum(-2) / counts


def per_target_cross_entropy_reference(
    logits: Tensor,
    target_bags: Tensor,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The s ordinary cross-entropies, 0 for ignored targets: [..., V], [..., s] -> [..., s]."""
    classes_second = logits.to(dtype).movedim(-1, 1) if logits.dim() > 1 else logits.to(dtype)
    losses = [
        F.cross_entropy(classes_second, targets, ignore_index=ignore_index, reduction="none")
        for targets in target_bags.unbind(-1)
    ]
    return torch.stack(losses, -1)


def multi_hot_cross_entropy_reference(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Weighted mean of the s cross-entropies over valid targets, 0 without any: -> [...]."""
    losses = per_target_cross_entropy_reference(logits, target_bags, ignore_index, dtype)
    weights = _valid_weights(target_bags, target_weights, ignore_index, dtype)
    total = weights.sum(-1)
    mean = (weights * losses).sum(-1) / total.where(total > 0, torch.ones_like(total))
    return mean.where(total > 0, torch.zeros_like(total))


def summed_probability_loss_reference(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``-log`` of the weighted mean probability of the valid targets, 0 without any: -> [...]."""
    weights = _valid_weights(target_bags, target_weights, ignore_index, dtype)
    probabilities = logits.to(dtype).softmax(-1)
    losses = []
    for row, bag, bag_weights in _rows(probabilities, target_bags, weights):
        if bag_weights.sum() == 0:
            losses.append(row.sum() * 0)
            continue
        counted = bag_weights > 0
        mean = (row[bag[counted]] * bag_weights[counted]).sum() / bag_weights.sum()
        losses.append(-mean.log())
    return torch.stack(losses).view(target_bags.shape[:-1])


def multi_label_bce_reference(
    logits: Tensor,
    target_bags: Tensor,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Binary cross-entropy summed over the vocabulary, per distinct valid target: -> [...]."""
    losses = []
    for row, bag in _rows(logits.to(dtype), target_bags):
        distinct = bag[bag != ignore_index].unique()
        is_target = torch.zeros_like(row).index_fill(0, distinct, 1)
        total = F.binary_cross_entropy_with_logits(row, is_target, reduction="sum")
        losses.append(total / len(distinct) if len(distinct) else row.sum() * 0)
    return torch.stack(losses).view(target_bags.shape[:-1])


def multi_label_hinge_reference(
    logits: Tensor,
    target_bags: Tensor,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Margin of 1 between each distinct valid target and each other entry, over V: -> [...]."""
    losses = []
    for row, bag in _rows(logits.to(dtype), target_bags):
        distinct = bag[bag != ignore_index].unique()
        is_other = torch.ones_like(row, dtype=torch.bool).index_fill(0, distinct, False)
        pairs = 1 - row[distinct].unsqueeze(1) + row[is_other].unsqueeze(0)
        # The gradient of clamp at its bound is 1 before torch 2.14 and 0 from there on.
        losses.append(pairs.relu().sum() / len(row))
    return torch.stack(losses).view(target_bags.shape[:-1])


def multi_token_losses_reference(
    hidden: Tensor,
    token_bags: Tensor,
    target_bags: Tensor,
    loss_mask: Tensor,
    depths: Sequence[Callable[[Tensor, Tensor], Tensor]],
    embedding: Tensor,
    output: Tensor,
    target_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean loss of each depth of multi-token prediction, all in one dtype.

    Depth k joins its state at position i with the mean embedding of bag i + k, of token 0 where the
    sequence has none, and is compared with target bag i + k, where there is one that counts. As
    Megatron's on single tokens, which are bags of one.

    Args:
        hidden: [b, l, h], of the model itself.
        token_bags: [b, l, s], input of the model.
        target_bags: [b, l, t], targets of the model.
        loss_mask: [b, l], 1 where a target bag counts.
        depths: layers; of states and embeddings, both [b, l, h].
        embedding: [V, h].
        output: [V, h], of the output layer.
        target_weights: [t], uniform by default.
        ignore_index: token and target that does not count.

    Returns:
        [k], 0 for a depth without targets.
    """
    losses, length, states = [], hidden.shape[1], hidden
    for k, depth in enumerate(depths, start=1):
        bags = torch.zeros_like(token_bags)
        bags[:, : length - k] = token_bags[:, k:]
        embedded = bag_embedding_reference(embedding, bags, hidden.dtype, ignore_index)
        states = depth(states, embedded)
        logits = (states @ output.T)[:, : length - k]
        targets, counts = target_bags[:, k:], loss_mask[:, k:].to(hidden.dtype)
        loss = multi_hot_cross_entropy_reference(
            logits, targets, target_weights, ignore_index, hidden.dtype
        )
        losses.append((loss * counts).sum() / counts.sum().clamp(min=1))
    return torch.stack(losses)


def _valid_weights(
    target_bags: Tensor, target_weights: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    valid = (target_bags != ignore_index).to(dtype)
    return valid if target_weights is None else valid * target_weights.to(dtype)


def _rows(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Position by position, whatever the leading dimensions."""
    return zip(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors), strict=True)
