"""The numerics as modules, for models and loops without Megatron."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.targets import (
    IGNORE_INDEX,
    TargetWeights,
    as_ids,
    as_weights,
    validate_target_values,
)

Reduction = Literal["mean", "sum", "none"]


class BagEmbedding(nn.Embedding):
    """An embedding that averages over bags of tokens; its weight is that of ``nn.Embedding``.

    Args:
        num_embeddings: rows (V).
        embedding_dim: width (h).
        ignore_index: negative id of places of a bag that hold no token; None where all hold one.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ignore_index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.ignore_index = ignore_index

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, ignore_index: int | None = None) -> Self:
        """One that shares the weight of an embedding, to take its place in a model.

        Raises:
            ValueError: it renormalises, scales or drops gradients, which bags do not.
        """
        for name in ("max_norm", "scale_grad_by_freq", "sparse", "padding_idx"):
            value = getattr(embedding, name)
            if value is not None and value is not False:
                raise ValueError(
                    f"the embedding has {name}={value}, which has no meaning for bags: build it "
                    "without."
                )
        rows, width = embedding.weight.shape
        found = cls(rows, width, ignore_index, device="meta")
        found.weight = embedding.weight
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [b, l], or bags of them [b, l, s] -> [b, l, h]."""
        if input.dim() < 3:
            return super().forward(input)
        return bag_embedding(self.weight, input, ignore_index=self.ignore_index)


class MultiHotCrossEntropyLoss(nn.Module):
    """Cross-entropy for bags of targets, and for single ones as ``nn.CrossEntropyLoss``.

    Args:
        target_weights: of the targets of a bag by offset, [s], such as
            ``SuperpositionConfig.target_weights()``; None: equal.
        ignore_index: target that does not count.
        reduction: ``mean`` over the positions that have a target of positive weight that counts,
            ``sum``, or ``none``.

    Raises:
        ValueError: an unknown reduction, or a weight that is negative or no number.
    """

    weights: Tensor | None

    def __init__(
        self,
        target_weights: TargetWeights | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}: choose one of mean, sum, none.")
        weights = as_weights(target_weights)
        # Not a part of the checkpoint: it follows from the settings.
        self.register_buffer(
            "weights", None if weights is None else weights.float(), persistent=False
        )
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: [..., V]; not changed.
            targets: ids, [...] for single targets or [..., s] for bags of them.

        Returns:
            A number, or [...] without reduction; float32 (float64 for float64 logits).

        Raises:
            ValueError: shapes do not fit, targets are no integers, or one of them (on the CPU)
                neither is in the vocabulary nor the ``ignore_index``.
        """
        targets = as_ids("targets", targets)
        if targets.dim() == logits.dim() - 1:
            losses = self._of_single_targets(logits, targets)
            counts = targets != self.ignore_index
        else:
            losses = multi_hot_cross_entropy(
                logits, targets, self.weights, ignore_index=self.ignore_index
            )
            is_left = targets != self.ignore_index
            counts = (is_left if self.weights is None else is_left & (self.weights > 0)).any(-1)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / counts.sum().clamp(min=1)

    def _of_single_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            validate_target_values(targets, logits.shape[-1], self.ignore_index)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            wide.flatten(0, -2),
            targets.flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        return losses.view(targets.shape)
