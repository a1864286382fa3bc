"""Bags that keep to their document, token by token, against samples written down one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tst.data.bags import IGNORE_INDEX
from tests.corpus import write_corpus, write_documents
from tests.datasets import DOCUMENT_LENGTHS, EOD, VARIANTS, Corpus, build_train

Place = tuple[int, int]
"""Document in the order of reading, and token."""


@dataclass
class Sample:
    """A sample position by position."""

    bags: list[list[Place | None]]
    targets: list[list[Place | None]]


def bags_of(documents: list[list[int]], bag_size: int) -> list[list[Place | None]]:
    """Each document in bags of its own, the last one filled up."""
    bags: list[list[Place | None]] = []
    for number, document in enumerate(documents):
        for begin in range(0, len(document), bag_size):
            bag: list[Place | None] = [(number, t) for t in document[begin : begin + bag_size]]
            bags.append(bag + [None] * (bag_size - len(bag)))
    return bags


def up_to_the_end_of_the_document(places: list[Place | None]) -> list[Place | None]:
    first = places[0]
    assert first is not None
    return [place if place is not None and place[0] == first[0] else None for place in places]


def naive_samples(
    documents: list[list[int]], length: int, bag_size: int, variant: str, switch: int
) -> Iterator[Sample]:
    """All samples in the order of the text."""
    reads_bags = variant != "output-only"
    bags = bags_of(documents, bag_size if reads_bags else 1)
    in_phase_1, later = bags[: switch * length], bags[switch * length :]
    # From the switch on every place holds a token, and phase 1 predicts a few of them.
    rest = [place for bag in later for place in bag if place is not None]
    for sample in range(switch):
        own = in_phase_1[sample * length : (sample + 1) * length]
        targets = []
        for position in range(sample * length, (sample + 1) * length):
            following = [place for bag in in_phase_1[position + 1 :][:bag_size] for place in bag]
            following = (following + rest[:bag_size])[:bag_size]
            count = 1 if variant == "input-only" else bag_size
            targets.append(up_to_the_end_of_the_document(following)[:count])
        yield Sample(own, targets)
    for begin in range(0, len(rest) - length, length):
        own = [[place] for place in rest[begin : begin + length]]
        yield Sample(own, [[place] for place in rest[begin + 1 : begin + length + 1]])


def ids(places: list[list[Place | None]]) -> Any:
    return np.array([[IGNORE_INDEX if p is None else p[1] for p in row] for row in places])


@settings(max_examples=60)
@given(
    document_lengths=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    length=st.integers(1, 6),
    bag_size=st.integers(2, 5),
    variant=st.sampled_from(VARIANTS),
    switch=st.integers(1, 8),
    num_samples=st.integers(1, 30),
)
@example([9, 6, 12], 3, 3, "full", 3, 8)  # documents of whole bags
@example([1, 1, 1, 1, 1, 1, 1, 1], 2, 5, "full", 8, 30)  # most of phase 1 is padding
@example([25], 2, 2, "full", 8, 30)  # phase 1 alone takes more than an epoch
@example([4, 0, 0, 7, 1], 4, 4, "output-only", 3, 20)
def test_no_bag_holds_tokens_of_two_documents(
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
            "align",
            sequence_length=length,
            switch_sample=switch,
        )
        ordered = [documents[number].tolist() for number in dataset.stream.documents.tolist()]
        # More text than is read: the naive twin makes all samples of phase 1, and some behind.
        naive = list(naive_samples(ordered * (switch + 2), length, bag_size, variant, switch))
        times_read = np.zeros(sum(document_lengths), dtype=np.int64)
        for place in range(num_samples):
            item, sample = dataset[place], int(dataset.stream.samples[place])
            expected = naive[sample]
            tokens, labels = ids(expected.bags), ids(expected.targets)
            np.testing.assert_array_equal(item["tokens"].reshape(length, -1), tokens)
            np.testing.assert_array_equal(item["labels"].reshape(length, -1), labels)
            np.testing.assert_array_equal(item["loss_mask"], (labels >= 0).any(axis=1))
            assert (item["tokens"].dim() == 2) == (sample < switch and variant != "output-only")
            np.add.at(times_read, tokens[tokens >= 0], 1)
            # At no time has a token been read twice more often than another one.
            assert times_read.max() - times_read.min() <= 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Each document ends with EOD."""
    prefix = tmp_path_factory.mktemp("documents") / "text"
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 50, length) for length in DOCUMENT_LENGTHS]
    for document in documents:
        document[-1] = EOD
    write_documents(prefix, documents)
    return prefix, documents


@pytest.mark.parametrize("variant", VARIANTS)
def test_eod_masks_what_is_predicted_across_documents(corpus: Corpus, variant: str) -> None:
    plain, masked = (
        build_train(corpus[0], 20, 3, variant, "align", switch_sample=12, eod_mask_loss=masks)
        for masks in (False, True)
    )
    ends_seen = 0
    for place in range(12):
        item, expected = masked[place], plain[place]
        ends = (expected["tokens"].reshape(4, -1) == EOD).any(dim=1)
        ends_seen += int(ends.sum())
        assert torch.equal(item["tokens"], expected["tokens"])
        assert torch.equal(item["loss_mask"], expected["loss_mask"] * ~ends)
        if variant == "input-only":
            assert torch.equal(item["labels"], expected["labels"])
        else:
            labels = expected["labels"].masked_fill(ends[:, None], IGNORE_INDEX)
            assert torch.equal(item["labels"], labels)
    assert ends_seen > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_are_marked_in_latent_positions(corpus: Corpus, variant: str) -> None:
    length, switch, num_samples = 8, 6, 20
    dataset = build_train(
        corpus[0],
        num_samples,
        3,
        variant,
        "align",
        sequence_length=length,
        switch_sample=switch,
        inter_document_masking=True,
    )
    for place in range(num_samples):
        item, sample = dataset[place], int(dataset.stream.samples[place])
        begin, end = dataset.layout.span(sample)
        _, _, pieces = dataset.stream.read(dataset.dataset, begin, end)
        tokens_per_position = 3 if sample < switch and variant != "output-only" else 1
        owners = np.repeat(np.arange(len(pieces)), pieces)[::tokens_per_position][:length]
        starts = [i for i in range(length) if i == 0 or owners[i] != owners[i - 1]]
        lengths = np.diff([*starts, length])
        padding = [length] * (length - len(starts))
        assert item["cu_seqlens"].tolist() == [*starts, length, *padding]
        assert item["cu_seqlens"].dtype == item["max_seqlen"].dtype == torch.int32
        assert item["max_seqlen"] == max(lengths)
        assert item["position_ids"].tolist() == [i for n in lengths for i in range(n)]


def test_marking_documents_needs_aligned_bags(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"--dataloader-inter-document-masking .*align"):
        build_train(corpus[0], 20, switch_sample=10, inter_document_masking=True)


def test_other_boundaries_have_a_cache_of_their_own(corpus: Corpus) -> None:
    crossing, aligned = (
        build_train(corpus[0], 20, document_boundary=boundary, switch_sample=10)
        for boundary in ("cross", "align")
    )
    assert crossing.stream.starts.tolist() != aligned.stream.starts.tolist()
