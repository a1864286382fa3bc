"""Every token of small corpora, through Megatron's dataset builder, sampler and data loader."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_tst import SuperpositionConfig
from megatron_tst.data.bags import IGNORE_INDEX
from megatron_tst.ops.objectives import superposition_loss
from tests.corpus import write_corpus, write_documents
from tests.datasets import (
    DOCUMENT_LENGTHS,
    EOD,
    PAD,
    TEST,
    TRAIN,
    VALID,
    VARIANTS,
    VOCABULARY_SIZE,
    Corpus,
    assert_equal_batches,
    build,
    build_train,
    flat_stream,
    make_config,
    samples,
    superposition,
    tokenizer,
)


def naive_item(
    flat: list[int], sample: int, length: int, bag_size: int, variant: str, switch: int
) -> tuple[Any, Any]:
    """Tokens and labels of a sample, written down position by position."""
    stride = 1 if variant == "output-only" else bag_size
    if sample >= switch:
        at = switch * stride * length + (sample - switch) * length
        return flat[at : at + length], flat[at + 1 : at + 1 + length]
    tokens: list[Any] = []
    labels: list[Any] = []
    for position in range(length):
        at = (sample * length + position) * stride
        tokens.append(flat[at] if variant == "output-only" else flat[at : at + bag_size])
        following = flat[at + stride : at + stride + bag_size]
        labels.append(following[0] if variant == "input-only" else following)
    return tokens, labels


@settings(max_examples=60)
@given(
    document_lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    length=st.integers(1, 6),
    bag_size=st.integers(2, 5),
    variant=st.sampled_from(VARIANTS),
    switch=st.integers(1, 8),
    num_samples=st.integers(1, 40),
)
@example([60, 45], 4, 3, "full", 5, 20)  # both phases and the epoch end where samples do
@example([25], 2, 2, "full", 8, 40)  # phase 1 alone takes more than an epoch
@example([5, 1, 1, 1, 30], 6, 5, "output-only", 3, 30)  # look-ahead nearly as long as a sample
def test_each_token_is_read_once_an_epoch(
    document_lengths: list[int],
    length: int,
    bag_size: int,
    variant: str,
    switch: int,
    num_samples: int,
) -> None:
    document_lengths.append((length + 1) * bag_size)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        documents = write_corpus(prefix, document_lengths)
        dataset = build_train(
            prefix,
            num_samples,
            bag_size,
            variant,
            sequence_length=length,
            switch_sample=switch,
        )
        assert len(dataset) == num_samples
        flat = flat_stream(dataset, documents)
        times_read = np.zeros(sum(document_lengths), dtype=np.int64)
        for place in range(num_samples):
            item = dataset[place]
            sample = int(dataset.stream.samples[place])
            tokens, labels = naive_item(flat, sample, length, bag_size, variant, switch)
            assert item["tokens"].tolist() == tokens
            assert item["labels"].tolist() == labels
            assert (item["tokens"].dim() == 2) == (place < switch and variant != "output-only")
            assert (item["labels"].dim() == 2) == (place < switch and variant != "input-only")
            np.add.at(times_read, item["tokens"].numpy().ravel(), 1)
            # At no time has a token been read twice more often than another one.
            assert times_read.max() - times_read.min() <= 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    return prefix, write_corpus(prefix, DOCUMENT_LENGTHS)


GLOBAL_BATCH = 8


def read_batches(
    dataset: Any, first: int, last: int, micro_batch: int, ranks: int
) -> list[dict[str, torch.Tensor]]:
    """Global batches ``first`` to ``last``, put together from the loaders of all ranks."""
    loaders: list[Iterator[dict[str, torch.Tensor]]] = []
    for rank in range(ranks):
        sampler = MegatronPretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=first * GLOBAL_BATCH,
            micro_batch_size=micro_batch,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        loaders.append(iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler)))
    batches = []
    for _ in range(first, last):
        micro_batches = [
            next(loader) for _ in range(GLOBAL_BATCH // (micro_batch * ranks)) for loader in loaders
        ]
        keys = micro_batches[0].keys()
        batches.append({key: torch.cat([batch[key] for batch in micro_batches]) for key in keys})
    return batches


SWITCH_STEP, TOTAL_STEPS = 3, 9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "runs",
    [
        # (first step, micro-batch size, data-parallel size) of each run
        [(0, 2, 4)],
        [(0, 4, 2), (2, 1, 4)],
        [(0, 8, 1), (3, 1, 2), (4, 2, 4)],
        [(0, 1, 1), (1, 2, 2), (5, 4, 1), (8, 1, 4)],
    ],
    ids=["one run", "restart before", "at", "around the switch"],
)
def test_batches_do_not_depend_on_ranks_or_restarts(
    corpus: Corpus,
    variant: str,
    runs: list[tuple[int, int, int]],
) -> None:
    prefix, documents = corpus
    num_samples = TOTAL_STEPS * GLOBAL_BATCH

    def dataset() -> Any:
        return build_train(
            prefix, num_samples, variant=variant, switch_sample=SWITCH_STEP * GLOBAL_BATCH
        )

    uninterrupted = read_batches(dataset(), 0, TOTAL_STEPS, GLOBAL_BATCH, 1)
    ends = [first for first, _, _ in runs[1:]] + [TOTAL_STEPS]
    restarted = [
        batch
        for (first, micro_batch, ranks), end in zip(runs, ends, strict=True)
        for batch in read_batches(dataset(), first, end, micro_batch, ranks)
    ]
    assert_equal_batches(restarted, uninterrupted)

    tokens_in = [batch["tokens"].numel() for batch in uninterrupted]
    per_position = 1 if variant == "output-only" else 3
    assert tokens_in == [GLOBAL_BATCH * 4 * per_position] * SWITCH_STEP + [GLOBAL_BATCH * 4] * 6
    read = np.concatenate([batch["tokens"].numpy().ravel() for batch in uninterrupted])
    times_read = np.bincount(read, minlength=sum(DOCUMENT_LENGTHS))
    epochs = len(read) / sum(map(len, documents))
    assert set(times_read) <= {int(epochs), int(epochs) + 1}


def test_samples_are_shuffled_within_each_phase(
    corpus: Corpus,
) -> None:
    dataset = build_train(corpus[0], 60, switch_sample=10)
    order = dataset.stream.samples.tolist()
    assert sorted(order[:10]) == list(range(10)) != order[:10]
    assert order[10:30] != sorted(order[10:30])
    other_seed = build_train(corpus[0], 60, switch_sample=10, random_seed=1)
    assert other_seed.stream.samples.tolist() != order
    assert other_seed.stream.documents.tolist() != dataset.stream.documents.tolist()


def test_a_longer_run_reads_the_same_samples_first(
    corpus: Corpus,
) -> None:
    shorter = build_train(corpus[0], 50, switch_sample=10)
    longer = build_train(corpus[0], 200, switch_sample=10)
    assert_equal_batches(samples(shorter, 50), samples(longer, 50))


@pytest.fixture(scope="module")
def special_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose documents end with EOD, some within a bag, and hold a few padding tokens."""
    prefix = tmp_path_factory.mktemp("special") / "text"
    generator = np.random.default_rng(0)
    documents = []
    for length in DOCUMENT_LENGTHS:
        document = generator.integers(1, 50, length)
        document[generator.random(length) < 0.1] = PAD
        document[-1] = EOD
        documents.append(document)
    write_documents(prefix, documents)
    return prefix


@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("pad", [-1, PAD])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_of_bags(special_tokens: Path, variant: str, pad: int, eod_mask_loss: bool) -> None:
    length, bag_size, switch = 4, 3, 12
    dataset = build_train(
        special_tokens,
        20,
        bag_size,
        variant,
        switch_sample=switch,
        tokenizer=tokenizer(pad),
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=True,
    )
    causal = torch.ones(length, length).triu(1).bool()[None]
    masked = 0
    for place in range(switch):
        text, _, _ = dataset._query_document_sample_shuffle_indices(place)
        item = dataset[place]
        flat = text.tolist()
        tokens, targets = naive_item(flat, 0, length, bag_size, variant, switch)
        _, previous = naive_item([-7, *flat[:-1]], 0, length, bag_size, variant, switch)
        targets, previous = np.array(targets), np.array(previous)
        padding = targets == pad
        ignored = padding | ((previous == EOD) & eod_mask_loss)
        masked += int(ignored.sum())
        if targets.ndim == 2:
            expected_labels = np.where(ignored, IGNORE_INDEX, targets)
            expected_loss_mask = (~ignored).any(axis=1)
        else:
            expected_labels = np.where(padding, 0, targets)
            expected_loss_mask = ~ignored
        expected_tokens = np.where(np.array(tokens) == pad, 0, tokens)
        np.testing.assert_array_equal(item["tokens"], expected_tokens)
        np.testing.assert_array_equal(item["labels"], expected_labels)
        np.testing.assert_array_equal(item["loss_mask"], expected_loss_mask)
        assert item["position_ids"].tolist() == list(range(length))
        assert torch.equal(item["attention_mask"], causal)
        dtypes = {key: value.dtype for key, value in item.items()}
        assert dtypes == {
            "tokens": torch.int64,
            "labels": torch.int64,
            "loss_mask": torch.float32,
            "position_ids": torch.int64,
            "attention_mask": torch.bool,
        }
        assert item["tokens"].is_contiguous()
        assert item["labels"].is_contiguous()
    assert (masked > 0) == (pad == PAD or eod_mask_loss)


@pytest.mark.parametrize("pad", [-1, PAD])
@pytest.mark.parametrize("variant", ["full", "output-only"])
def test_a_position_counts_for_its_weighted_targets(
    special_tokens: Path, variant: str, pad: int
) -> None:
    """The loss is 0 where only targets of weight 0 are left: its mean must not count those."""
    config = SuperpositionConfig(
        bag_size=3, steps=1, variant=variant, target_weighting="first-token"
    )
    settings: dict[str, Any] = {"tokenizer": tokenizer(pad), "eod_mask_loss": True}
    dataset = build(
        make_config(special_tokens, superposition=config, switch_sample=12, **settings), (20, 0, 0)
    )[TRAIN]
    without_weight = 0
    for item in samples(dataset, 12):
        losses = superposition_loss(
            torch.zeros(4, VOCABULARY_SIZE), item["labels"], "mce", config.target_weights()
        )
        assert torch.equal(item["loss_mask"], (losses > 0).float())
        is_left = (item["labels"] != IGNORE_INDEX).any(-1)
        without_weight += int((is_left & (item["loss_mask"] == 0)).sum())
    assert without_weight > 0


@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("create_attention_mask", [False, True])
def test_plain_samples_are_those_of_upstream(
    special_tokens: Path, tmp_path: Path, eod_mask_loss: bool, create_attention_mask: bool
) -> None:
    """Upstream's dataset reads the text behind the switch, written as one document."""
    options = {
        "tokenizer": tokenizer(PAD),
        "eod_mask_loss": eod_mask_loss,
        "create_attention_mask": create_attention_mask,
    }
    switch, num_samples, length = 6, 46, 4
    dataset = build_train(special_tokens, num_samples, switch_sample=switch, **options)
    begin, end = dataset.layout.span(switch)[0], int(dataset.stream.starts[-1])
    text, _, _ = dataset.stream.read(dataset.dataset, begin, end)

    prefix = tmp_path / "flat"
    write_documents(prefix, [text])
    config = make_config(prefix, GPTDatasetConfig, **options)
    upstream = build(config, (num_samples - switch, 0, 0), GPTDataset)[TRAIN]
    place_of = {int(sample): place for place, sample in enumerate(upstream.shuffle_index)}

    for place in range(switch, num_samples):
        item = dataset[place]
        expected = upstream[place_of[int(dataset.stream.samples[place]) - switch]]
        assert item["tokens"].shape == (length,)
        assert_equal_batches([item], [expected])


@pytest.mark.parametrize("bag_size", [1, 3])
def test_padding_of_the_first_sample_is_masked_in_it_alone(
    special_tokens: Path, bag_size: int
) -> None:
    """Whichever plain sample is read first; no token of the text is 0, which padding becomes."""
    settings = SuperpositionConfig() if bag_size == 1 else superposition(bag_size)
    config = make_config(
        special_tokens, superposition=settings, switch_sample=2, tokenizer=tokenizer(PAD)
    )
    firsts_with_padding = 0
    for first in range(2, 12):
        dataset = build(config, (20, 0, 0))[TRAIN]
        for place in (first, *range(2, 20)):
            item = dataset[place]
            assert torch.equal(item["loss_mask"], (item["labels"] != 0).float())
        firsts_with_padding += int((dataset[first]["loss_mask"] == 0).any())
    assert firsts_with_padding > 0


@pytest.mark.parametrize(
    ("bag_size", "split"), [(1, TRAIN), (1, VALID), (1, TEST), (3, VALID), (3, TEST)]
)
def test_other_splits_and_plain_runs_are_upstreams(
    special_tokens: Path, bag_size: int, split: int
) -> None:
    sizes = (30, 12, 9)
    options: dict[str, Any] = {"split": "60,25,15", "create_attention_mask": True}
    plain = build(make_config(special_tokens, GPTDatasetConfig, **options), sizes, GPTDataset)
    settings = SuperpositionConfig() if bag_size == 1 else superposition(bag_size)
    config = make_config(special_tokens, superposition=settings, switch_sample=4, **options)
    ours = build(config, sizes)
    assert len(ours[split]) == len(plain[split]) >= sizes[split]
    assert_equal_batches(samples(ours[split], sizes[split]), samples(plain[split], sizes[split]))


def test_superposition_reads_only_its_split(
    corpus: Corpus,
) -> None:
    prefix, documents = corpus
    dataset = build_train(prefix, 40, switch_sample=4, split="60,40,0")
    held_out = {token for document in documents[9:] for token in document.tolist()}
    read = torch.cat([dataset[place]["tokens"].ravel() for place in range(40)])
    assert set(dataset.stream.documents.tolist()) == set(range(9))
    assert not held_out & set(read.tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_that_fills_a_batch_does_not_count(corpus: Corpus, variant: str) -> None:
    dataset = build_train(corpus[0], 20, variant=variant, switch_sample=10)
    filler = dataset[None]
    assert filler.keys() == dataset[0].keys()
    assert filler["labels"].shape == dataset[0]["labels"].shape
    assert not filler["loss_mask"].any()
    if variant != "input-only":
        assert (filler["labels"] == IGNORE_INDEX).all()
    assert dataset[0]["loss_mask"].all()
