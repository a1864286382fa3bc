"""What is in a corpus, and which bags training would read from it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.common.splits import training_share
from megatron_tst.data.bags import IGNORE_INDEX
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.data.files import check_indexed_dataset
from megatron_tst.data.stream import fill_up
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Bags, bags_name
from megatron_tst.settings.schedule import SuperpositionSchedule

# Stands for bags of unknown number. The order of an epoch that lies in a phase as a whole does not
# depend on where the phase ends.
_ENDLESS = 1 << 60


def open_corpus(path_prefix: str) -> IndexedDataset:
    """Maps a corpus into memory.

    Args:
        path_prefix: path without ``.bin`` or ``.idx``.

    Raises:
        UsageError: its files are missing, damaged, do not belong together, or hold no text.
    """
    check_indexed_dataset(path_prefix)
    if Path(f"{path_prefix}.bin").stat().st_size == 0:
        raise UsageError(f"{path_prefix}.bin is empty: none of its documents has a token.")
    return IndexedDataset(path_prefix)


@dataclass(frozen=True)
class PhaseOne:
    """All that the order of the samples with bags depends on, as the flags of training give it.

    Attributes:
        sequence_length: ``--seq-length``.
        superposition: settings of :class:`megatron_tst.SuperpositionConfig`, by name: those that
            order the text.
        split: ``--split``; "1,0,0" for a corpus of ``--train-data-path``.
        seed: ``--seed``.
        samples: samples with bags, their steps times the global batch size; None for an epoch or
            more, the first of which does not depend on it.
        bags: bag size and samples of each phase with bags, where there are several.
        batch_size: ``--global-batch-size``, for bag sizes that are drawn for steps.

    Raises:
        UsageError: naming the flag of tst inspect, its value and the remedy.
    """

    sequence_length: int
    superposition: Mapping[str, Any]
    split: str = "1,0,0"
    seed: int = 1234
    samples: int | None = None
    bags: Bags = ()
    batch_size: int | None = None

    def __post_init__(self) -> None:
        values = {**vars(self), **self.superposition}
        at_least = {"sequence_length": 1, "bag_size": 2, "seed": 0, "samples": 1}
        for name, minimum in at_least.items():
            value = values.get(name)
            if value is not None and value < minimum:
                flag = "--phase-1-samples" if name == "samples" else f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {value}: use {minimum} or more.")
        if self._drawn is not None:
            self._check_steps()
        if not training_share(self.split):
            raise UsageError(
                f"--split {self.split!r} gives training no share: pass it as to training, "
                "for example 98,1,1."
            )

    @property
    def _drawn(self) -> str | None:
        return self.superposition.get("bag_sizes")

    def _check_steps(self) -> None:
        wanted = f"--bag-sizes {self._drawn} are drawn for the steps of a run"
        for flag, value in (
            ("--phase-1-samples", self.samples),
            ("--global-batch-size", self.batch_size),
        ):
            if value is None or value < 1:
                raise UsageError(f"{wanted}, and {flag} is {value}: pass its value, 1 or more.")
        assert self.samples is not None
        assert self.batch_size is not None
        if self.samples % self.batch_size:
            raise UsageError(
                f"{wanted}, and --phase-1-samples {self.samples} are no whole steps of "
                f"--global-batch-size {self.batch_size}: pass steps times global batch size."
            )

    @cached_property
    def schedule(self) -> SuperpositionSchedule:
        """Of a run whose steps read a sample each, unless bag sizes are drawn for them."""
        batch_size = self.batch_size if self.batch_size and self._drawn else 1
        steps = (self.samples or _ENDLESS) // batch_size
        return SuperpositionSchedule(
            SuperpositionConfig(**self.superposition, steps=steps),
            steps + 1,
            BatchSizes.constant(batch_size),
            self.sequence_length,
            bags=self.bags,
            seed=self.seed,
        )


@dataclass(frozen=True)
class PhaseOneSample:
    """One sample as training reads it.

    Attributes:
        inputs: [l, s] int64, or [l, 1] where bags are not read; ``IGNORE_INDEX`` where a bag holds
            no token.
        targets: [l, s] int64, or [l, 1] where bags are not predicted; ``IGNORE_INDEX`` where a
            target does not count.
        documents: the documents that its text and look-ahead come from, in order.
        begin: its first position in the stream of all epochs.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: list[int]
    begin: int


def read_phase_1(
    path_prefix: str, settings: PhaseOne, places: Sequence[int], tokenizer: Path | None = None
) -> list[PhaseOneSample]:
    """Reads samples with bags through the dataset of training.

    The order of the text is worked out for the whole train split, as training does, and kept in a
    temporary folder meanwhile (12 bytes a document, and 4 a sample).

    Args:
        path_prefix: path without ``.bin`` or ``.idx``.
        settings: of the run.
        places: which samples, in the order in which training reads them.
        tokenizer: folder of the tokenizer, whose padding token does not count as a target.

    Raises:
        UsageError: the corpus is damaged or too short, or there is no such sample.
    """
    with tempfile.TemporaryDirectory(prefix="inspect-data-") as cache:
        config = _dataset_config(path_prefix, settings, tokenizer, cache)
        _refuse_beyond(places, path_prefix, settings, config)
        builder = BlendedMegatronDatasetBuilder(
            SuperpositionGPTDataset, [max(places) + 1, 0, 0], lambda: True, config
        )
        dataset = builder.build()[0]
        return [_read(dataset, place) for place in places]


def _dataset_config(
    path_prefix: str, settings: PhaseOne, tokenizer: Path | None, cache: str
) -> SuperpositionGPTDatasetConfig:
    config = SuperpositionGPTDatasetConfig(
        random_seed=settings.seed,
        sequence_length=settings.sequence_length,
        blend=([path_prefix], None),
        split=settings.split,
        path_to_cache=cache,
        tokenizer=_megatron_tokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        superposition=settings.schedule.config,
        phases=settings.schedule.stretches,
    )
    assert config.split_matrix is not None
    config.split_matrix[1:] = [None, None]
    return config


def _megatron_tokenizer(folder: Path | None) -> Any:
    if folder is None:
        # Without text there is nothing to decode; its padding token is no token of a corpus.
        return MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=1, eod_id=-1, pad_id=-1
        )
    try:
        return MegatronTokenizer.from_pretrained(
            tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
        )
    # Hugging Face raises many kinds of exceptions, some of them a page long.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--tokenizer {folder} cannot be loaded as training would ({reason}): pass the folder "
            "of a Hugging Face tokenizer."
        ) from error


def _refuse_beyond(
    places: Sequence[int],
    path_prefix: str,
    settings: PhaseOne,
    config: SuperpositionGPTDatasetConfig,
) -> None:
    """Refuses samples that do not exist, before the order of the text is worked out."""
    # Held on to: a corpus that is let go of unmaps the memory that its arrays lie in.
    corpus = open_corpus(path_prefix)
    lengths = corpus.sequence_lengths
    train_documents = round(config.split_matrix[0][1] * len(lengths))
    phase = config.phases[0]
    positions = fill_up(lengths[:train_documents], phase.document_multiple)
    per_sample = settings.sequence_length * phase.tokens_per_position
    per_epoch = -(-int(positions.sum()) // per_sample)
    samples = settings.samples or max(per_epoch, 1)
    wrong = [place for place in places if not 0 <= place < samples]
    if wrong:
        unit = bags_name(settings.schedule.phases)
        unit = unit if settings.samples else f"an epoch of {unit}"
        raise UsageError(
            f"--sample {wrong[0]} does not exist: {unit} has {samples} samples, counted from 0."
        )


def _read(dataset: SuperpositionGPTDataset, place: int) -> PhaseOneSample:
    item = dataset[place]
    length = dataset.config.sequence_length
    # Single labels carry their mask beside them, bags of labels inside.
    targets = item["labels"].reshape(length, -1)
    targets = targets.masked_fill(item["loss_mask"].reshape(length, 1) == 0, IGNORE_INDEX)
    begin, end = dataset.span(place)
    _, documents, _ = dataset.stream.read(dataset.dataset, begin, end)
    return PhaseOneSample(
        item["tokens"].reshape(length, -1).numpy(), targets.numpy(), documents.tolist(), begin
    )
