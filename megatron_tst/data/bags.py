"""Folds the text of a sample of phase 1 into bags of tokens, targets and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_tst.data.stream import PADDING
from megatron_tst.settings.phases import Phase

IGNORE_INDEX = PADDING
"""Label of a target in a bag that does not count, and token of a place that holds none."""


@dataclass(frozen=True)
class BagFolder:
    """Folds text into bags.

    Attributes:
        phase: whose bags they are.
        sequence_length: latent positions a sequence (l).
        eod: id of the end of a document.
        pad: id of padding in the text, which has no embedding and is no target.
        eod_mask_loss: no loss for what follows the end of a document.
        target_weights: [s], of the targets of a bag; None: all count alike.
    """

    phase: Phase
    sequence_length: int
    eod: int
    pad: int | None
    eod_mask_loss: bool
    target_weights: Sequence[float] | None = None

    def fold(self, text: Tensor, document_lengths: list[int]) -> dict[str, Tensor]:
        """Makes tokens, labels and loss mask.

        Args:
            text: [s * l + s] or [l + s] int64, a sample of phase 1 with its look-ahead.
            document_lengths: positions of each document in it.

        Returns:
            tokens and labels, [l, s] or [l] int64, and loss_mask, [l] float32, zero where no target
            of positive weight counts. Of bags, places that hold no token, and targets that do not
            count, are ``IGNORE_INDEX``. Tokens and labels may share the memory of the text.
        """
        is_padding = self._is(text, self.pad)
        has_padding = bool(is_padding.any())
        # Copies only where something is masked, which is rare.
        tokens = text.masked_fill(is_padding, 0) if has_padding else text
        tokens = tokens[: len(text) - self.phase.look_ahead]
        if self.phase.reads_bags:
            tokens = tokens.view(self.sequence_length, -1)
        following, is_padding = text[1:], is_padding[1:]
        if not (has_padding or self.phase.aligns_documents or self.eod_mask_loss):
            labels, loss_mask = self._fold(following), torch.ones(self.sequence_length)
            return {"tokens": tokens, "labels": labels.contiguous(), "loss_mask": loss_mask}
        if self.phase.aligns_documents:
            ignored = self._fold(is_padding) | self._crosses_documents(
                tokens, following, document_lengths
            )
        elif self.eod_mask_loss:
            # As upstream: the target behind the end of a document does not count.
            ignored = self._fold(is_padding | (text[:-1] == self.eod))
        else:
            ignored = self._fold(is_padding)
        if self.phase.predicts_bags:
            # The loss of a bag whose targets left are of weight 0 is 0, and no mean may count it.
            adds_nothing = ignored if self._weightless is None else ignored | self._weightless
            # A sum, because torch is slow at all() over a short dimension.
            counts = adds_nothing.sum(dim=-1) < self.phase.bag_size
            masked, instead = ignored, IGNORE_INDEX
        else:
            counts = ~ignored
            # A label of its own must be an id, as in upstream's samples.
            masked, instead = self._fold(is_padding), 0
        labels = self._fold(following)
        if masked.any():
            labels = labels.masked_fill(masked, instead)
        return {"tokens": tokens, "labels": labels.contiguous(), "loss_mask": counts.float()}

    @cached_property
    def _weightless(self) -> Tensor | None:
        """Which targets of a bag have weight 0, [s] bool; None where none has."""
        is_zero = [weight == 0 for weight in self.target_weights or ()]
        return torch.tensor(is_zero) if any(is_zero) else None

    @staticmethod
    def _is(token_ids: Tensor, special: int | None) -> Tensor:
        # A tokenizer without a padding token has None here, which equals no id.
        if special is None:
            return torch.zeros_like(token_ids, dtype=torch.bool)
        return token_ids == special

    def _fold(self, following: Tensor) -> Tensor:
        """Arranges what belongs to all tokens but the first as labels: [l, s] or [l]."""
        folded: Tensor = self.phase.variant.fold_targets(following, self.phase.bag_size)
        return folded

    def _crosses_documents(
        self, tokens: Tensor, following: Tensor, document_lengths: list[int]
    ) -> Tensor:
        """Targets of aligned bags, [l, s] or [l], that a bag must not predict."""
        crosses = self._fold(following == PADDING)
        if self.phase.predicts_bags:
            lengths = torch.tensor(document_lengths)
            documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            targets = self._fold(documents[1:])
            # A bag of targets belongs to the document of the first of them.
            crosses = crosses | (targets != targets[:, :1])
        if self.eod_mask_loss:
            # What follows an end of document belongs to the next one as a whole.
            ends = (tokens == self.eod).view(self.sequence_length, -1).any(dim=-1)
            crosses = crosses | (ends if crosses.dim() == 1 else ends.unsqueeze(-1))
        return crosses


def document_boundaries(
    document_lengths: list[int], tokens_per_position: int, sequence_length: int
) -> dict[str, Tensor]:
    """Where documents begin in a sample of phase 1, in the form of upstream's packed sequences.

    Args:
        document_lengths: positions of each document in the text of the sample with its look-ahead.
        tokens_per_position: positions of the text in a latent position; documents are multiples.
        sequence_length: latent positions of the sample (l).

    Returns:
        cu_seqlens, [l + 1] int32, the latent position at which each document begins, filled up with
        l; max_seqlen, int32; and position_ids, [l] int64, which restart at each document.
    """
    ends = torch.tensor(document_lengths).cumsum(0).div(tokens_per_position, rounding_mode="floor")
    # Empty documents end where the one before does, and those of the look-ahead at or behind l.
    bounds = torch.cat((torch.zeros_like(ends[:1]), ends.clamp(max=sequence_length))).unique()
    cu_seqlens = torch.full((sequence_length + 1,), sequence_length, dtype=torch.int32)
    cu_seqlens[: len(bounds)] = bounds
    positions = torch.arange(sequence_length)
    document = torch.searchsorted(cu_seqlens, positions.to(torch.int32), right=True) - 1
    return {
        "position_ids": positions - cu_seqlens[document],
        "cu_seqlens": cu_seqlens,
        "max_seqlen": cu_seqlens.diff().max(),
    }
