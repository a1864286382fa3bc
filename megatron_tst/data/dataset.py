"""The phase-aware GPT dataset: bags of tokens before the switch, plain samples from it on.

The train split is one stream of tokens (``megatron_tst.data.stream``); of a blend, each corpus is.
The dataset alone knows where the switch lies: a sample's index decides whether it comes as bags or
as a plain sample.

| variant     | tokens of a sample of phase 1 | labels of a sample of phase 1              |
|-------------|-------------------------------|--------------------------------------------|
| full        | [l, s] bags                   | [l, s] the next bag                        |
| input-only  | [l, s] bags                   | [l] the first token of the next bag        |
| output-only | [l]                           | [l, s] the s tokens after each position    |

Samples of phase 2 are made by upstream's own code from the text that this dataset hands to it. The
other splits, and a run without superposition, are upstream's from end to end.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    _get_ltor_masks_and_position_ids,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from megatron_tst.common.errors import UsageError
from megatron_tst.data.bags import IGNORE_INDEX, BagFolder, document_boundaries
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.data.exclusion import Exclusion, StreamBuilder, build_without
from megatron_tst.data.files import check_document_lengths, check_indexed_dataset, fingerprint
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import TokenStream


class SuperpositionGPTDataset(GPTDataset):
    """GPT dataset whose train split comes as bags of tokens up to the switch.

    The order of the text is saved in the cache folder (``config.path_to_cache``, or beside the
    corpus) by rank 0 and mapped into memory by every rank when it reads its first sample.
    ``BlendedMegatronDatasetBuilder`` lets rank 0 go first. Local to a rank, without collectives.

    Args:
        indexed_dataset: the corpus.
        dataset_path: its path, without ``.bin`` or ``.idx``.
        indexed_indices: [documents of the split] int32, their indices in the corpus.
        num_samples: number of samples, exactly the length of the train split.
        index_split: train, valid or test.
        config: configuration.

    Raises:
        UsageError: no number of samples, a split shorter than one sample, or no cache on a rank
            that does not build it.
    """

    config: SuperpositionGPTDatasetConfig
    indices: Any

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """Opens the corpus.

        Raises:
            UsageError: its files are missing, damaged, or do not belong together.
        """
        check_indexed_dataset(dataset_path)
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    @property
    def is_superposed(self) -> bool:
        """Whether this split has a phase of bags."""
        return self.index_split is Split.train and self.config.superposition.enabled

    @cached_property
    def layout(self) -> SampleLayout:
        """Where the samples lie in the stream."""
        phases = self.config.phases_of(str(self.dataset_path))
        return SampleLayout(self.config.sequence_length, phases)

    @cached_property
    def text_layout(self) -> SampleLayout:
        """The same with bags read in the place of those with documents left out later."""
        return self.layout.with_more_bags(self.stream.more_bags.tolist())

    @cached_property
    def stream(self) -> TokenStream:
        """Order of documents and samples, mapped from the cache."""
        return TokenStream.load(self._cache_prefix)

    def __len__(self) -> int:
        """Number of samples; exactly the requested number for the train split."""
        if not self.is_superposed:
            return super().__len__()
        assert self.num_samples is not None
        return self.num_samples

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """One sample; the type and shape of tokens and labels follow its phase.

        Args:
            idx: index of the sample; None for a sample that fills up a batch and does not count.

        Returns:
            tokens and labels, [l, s] or [l] int64 (see the table above); loss_mask, [l] float32,
            zero where no target of positive weight counts; position_ids, [l] int64; and where the
            configuration asks for it attention_mask, [1, l, l] bool, true where attention is
            masked. A target in a bag that does not count is ``IGNORE_INDEX``, and so is a place of
            a bag that holds no token. With inter-document masking also cu_seqlens, [l + 1] int32,
            and max_seqlen, int32, in latent positions; position_ids then restart at each document.
        """
        if not self.is_superposed:
            return self._plain_item(idx)
        # By its place: a document left out in phase 1 lets it read samples from behind it.
        phase = self.layout.phases[self.layout.phase_of(idx or 0)]
        if not phase.is_superposed:
            return self._plain_item(idx)
        text, _, lengths = self.stream.read(self.dataset, *self.span(idx))
        item = self._bags(phase.bag_size, torch.from_numpy(text), lengths)
        if idx is None:
            item["loss_mask"].zero_()
            if item["labels"].dim() == 2:
                item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
        return item

    def _plain_item(self, idx: int | None) -> dict[str, Tensor]:
        """Upstream's sample; its padding is masked in this sample alone."""
        had_mask = self.masks_and_position_ids_are_cached
        if had_mask and idx is not None and not self.config.inter_document_masking:
            text, _, _ = self._query_document_sample_shuffle_indices(idx)
            if self.config.add_extra_token_to_sequence and self._pad_token_id not in text:
                return self._unmasked_item(torch.from_numpy(text))
        item: dict[str, Tensor] = super().__getitem__(idx)
        if self.masks_and_position_ids_are_cached and not had_mask:
            # Upstream writes the padding of this first sample into the mask that it keeps for all
            # others (Megatron-LM pull request 6981). It keeps one only where no other target is
            # left out.
            self.cached_loss_mask = torch.ones(self.config.sequence_length)
        return item

    def _unmasked_item(self, text: Tensor) -> dict[str, Tensor]:
        """Upstream's sample of a text [l + 1] without padding, whose memory it shares."""
        item = {
            "tokens": text[:-1],
            "labels": text[1:],
            # It belongs to the caller.
            "loss_mask": self.cached_loss_mask.clone(),
            "position_ids": self.cached_position_ids,
        }
        if self.config.create_attention_mask:
            item["attention_mask"] = self.cached_attention_mask
        return item

    def span(self, idx: int | None) -> tuple[int, int]:
        """Where the text of a sample lies in the stream, look-ahead included."""
        return self.text_layout.span(int(self.stream.samples[idx or 0]))

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Text of a sample with its look-ahead: what upstream's code makes a plain sample from."""
        if not self.is_superposed:
            return super()._query_document_sample_shuffle_indices(idx)
        return self.stream.read(self.dataset, *self.span(idx))

    def _bags(self, size: int, text: Tensor, document_lengths: list[int]) -> dict[str, Tensor]:
        """A sample of bags from its text with look-ahead, [s * l + s] or [l + s] int64."""
        folder = self._folders[size]
        item = folder.fold(text, document_lengths)
        if self.config.inter_document_masking:
            return item | document_boundaries(
                document_lengths, folder.phase.tokens_per_position, self.config.sequence_length
            )
        item["position_ids"] = self._position_ids
        if self.config.create_attention_mask:
            item["attention_mask"] = self._attention_mask
        return item

    @cached_property
    def _folders(self) -> dict[int, BagFolder]:
        """By bag size."""
        config = self.config
        special = config.tokenizer.eod, self._pad_token_id
        phases = {phase.bag_size: phase for phase in self.layout.phases}
        return {
            size: BagFolder(
                phase,
                config.sequence_length,
                *special,
                config.eod_mask_loss,
                config.superposition.target_weights(size),
            )
            for size, phase in phases.items()
        }

    @cached_property
    def _position_ids(self) -> Tensor:
        return torch.arange(self.config.sequence_length, dtype=torch.long)

    @cached_property
    def _attention_mask(self) -> Tensor:
        tokens = torch.zeros(self.config.sequence_length, dtype=torch.long)
        attention_mask, _, _ = _get_ltor_masks_and_position_ids(
            tokens,
            eod_token=self.config.tokenizer.eod,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=True,
        )
        return attention_mask

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Upstream's hook that builds or finds the cache."""
        self._identify()
        # What is left out from the start is no part of the split.
        absent = [each.documents for each in self._exclusions if not each.first_place]
        if absent and self.indices is not None:
            self.indices = self.indices[~np.isin(self.indices, np.concatenate(absent))]
        if not self.is_superposed:
            return super()._build_document_sample_shuffle_indices()
        if not self.num_samples:
            raise UsageError(
                f"The train split was asked for {self.num_samples} samples: superposition needs "
                "their number. Pass --train-iters or --train-samples."
            )
        missing = [p for p in TokenStream.paths(self._cache_prefix).values() if not p.is_file()]
        if missing:
            self._build_cache(missing[0])
        # Only the builder needs them: four bytes for each document, on every rank.
        self.indices = None
        # Upstream's own indices have no part in this split.
        return None, None, None

    def _get_num_tokens_per_epoch(self) -> int:
        """Upstream's hook that counts the tokens of the split, for a cache that is not there."""
        # With deferred mapping every rank asks, each time that it wants to know the length.
        if not self.config.defer_npy_index_mmap:
            check_document_lengths(str(self.dataset_path), self.dataset.sequence_lengths)
        tokens = int(super()._get_num_tokens_per_epoch())
        # Upstream counts epochs until there is enough text, which never happens without any.
        if not tokens:
            raise UsageError(
                f"--data-path {self.dataset_path}: its {self.index_split.name} split holds "
                f"no tokens. Give it a larger share than --split {self.config.split} does, or none "
                "(0)."
            )
        return tokens

    def _identify(self) -> None:
        """Makes the name of the cache depend on all that the order of the text depends on."""
        # A corpus rewritten under the same path must not be read in the order of the old one.
        if not is_object_storage_path(str(self.dataset_path)):
            index_path = get_idx_path(str(self.dataset_path))
            self.unique_identifiers["index_fingerprint"] = fingerprint([index_path])
        if self.is_superposed:
            self.unique_identifiers["sample_layout"] = self.layout.text_order()
        if self._exclusions:
            self.unique_identifiers["left_out"] = [
                [exclusion.first_place, exclusion.documents.tolist()]
                for exclusion in self._exclusions
            ]
        # A run that only evaluates finds the cache of the one that trained.
        self.unique_identifiers["split_matrix"] = self.config.whole_split_matrix
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()

    @cached_property
    def _exclusions(self) -> list[Exclusion]:
        if self.index_split is not Split.train:
            return []
        return self.config.exclusions_of(str(self.dataset_path))

    @property
    def _cache_prefix(self) -> Path:
        name = type(self).__name__
        folder = self.config.path_to_cache or f"{self.dataset.path_prefix}/cache/{name}_indices"
        return Path(folder) / f"{self.unique_description_hash}-{name}-{self.index_split.name}"

    def _build_cache(self, missing: Path) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # --dataloader-fast-cache-load gives no documents: it promises that the cache is there.
        if rank != 0 or self.indices is None:
            raise UsageError(
                f"--data-cache-path {missing.parent}: rank {rank} does not find {missing.name}, "
                "which rank 0 builds. Use a folder that all nodes share, and run once without "
                "--dataloader-fast-cache-load."
            )
        assert self.num_samples is not None
        check_document_lengths(str(self.dataset_path), self.dataset.sequence_lengths)
        builder = StreamBuilder(
            self.indices,
            self.dataset.sequence_lengths,
            self.config.random_seed,
            str(self.dataset_path),
        )
        later = [exclusion for exclusion in self._exclusions if exclusion.first_place]
        if later:
            stream = build_without(builder, self.layout, self.num_samples, later)
        else:
            stream = builder.build(self.layout, self.num_samples)
        stream.save(self._cache_prefix)
