"""Megatron's dataset builder on small corpora, for the tests of the phase-aware dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from numpy.typing import NDArray

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.settings.config import DocumentBoundary
from megatron_tst.settings.phases import Phase

Corpus = tuple[Path, list[NDArray[np.int64]]]
VARIANTS = ("full", "input-only", "output-only")
VOCABULARY_SIZE = 100_000
# Tokens 0 .. n-1 have an identity each; these two are outside of them.
EOD, PAD = 99_999, 99_998
TRAIN, VALID, TEST = range(3)
DOCUMENT_LENGTHS = [7, 1, 30, 12, 3, 55, 2, 19, 41, 8, 26, 4, 11, 60, 21]


def tokenizer(pad: int = -1) -> Any:
    return MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"},
        vocab_size=VOCABULARY_SIZE,
        eod_id=EOD,
        pad_id=pad,
    )


def superposition(
    bag_size: int, variant: str = "full", document_boundary: DocumentBoundary = "cross"
) -> SuperpositionConfig:
    # The dataset takes the switch as a sample; the step count here plays no part.
    return SuperpositionConfig(
        bag_size=bag_size, steps=1, variant=variant, document_boundary=document_boundary
    )


def phases(config: SuperpositionConfig, switch_sample: int) -> tuple[Phase, ...]:
    """Of a run whose steps read a sample each."""
    if not config.enabled:
        return (Phase(0, 0),)
    as_steps = replace(config, steps=switch_sample, step_ratio=None)
    schedule = SuperpositionSchedule(as_steps, switch_sample + 1, BatchSizes.constant(1), 1)
    return schedule.stretches


def make_config(
    prefix: Path, config_class: Any = None, switch_sample: int | None = None, **changes: Any
) -> Any:
    if switch_sample is not None and "superposition" in changes:
        changes["phases"] = phases(changes["superposition"], switch_sample)
    settings = {
        "random_seed": 1234,
        "sequence_length": 4,
        "blend": ([str(prefix)], None),
        "split": "1,0,0",
        "path_to_cache": str(prefix.parent / "cache"),
        "tokenizer": tokenizer(),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    return (config_class or SuperpositionGPTDatasetConfig)(**(settings | changes))


def build(config: Any, sizes: Any, dataset_class: Any = SuperpositionGPTDataset) -> Any:
    return BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: True, config).build()


def build_train(
    prefix: Path,
    num_samples: int,
    bag_size: int = 3,
    variant: str = "full",
    document_boundary: DocumentBoundary = "cross",
    **changes: Any,
) -> Any:
    settings = superposition(bag_size, variant, document_boundary)
    config = make_config(prefix, superposition=settings, **changes)
    return build(config, (num_samples, 0, 0))[TRAIN]


def flat_stream(dataset: Any, documents: list[NDArray[np.int64]]) -> list[int]:
    """The text of all epochs, one token after the other; checks that each epoch is complete."""
    order = dataset.stream.documents.tolist()
    for first in range(0, len(order), len(documents)):
        assert sorted(order[first : first + len(documents)]) == list(range(len(documents)))
    return [token for document in order for token in documents[document].tolist()]


def samples(dataset: Any, count: int) -> list[dict[str, torch.Tensor]]:
    return [dataset[place] for place in range(count)]


def assert_equal_batches(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
