"""Where samples lie in the stream, in which order they are read, and how text is looked up."""

from __future__ import annotations

from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tst.data import stream as stream_module
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import TokenStream, shuffle_documents, shuffle_samples
from megatron_tst.settings.phases import Phase
from megatron_tst.settings.variants import VARIANTS


def two_phases(
    length: int, switch_sample: int, bag_size: int, variant: str = "full"
) -> SampleLayout:
    bags = Phase(0, 0, bag_size, VARIANTS[variant])
    return SampleLayout(length, (bags, Phase(1, switch_sample)))


@st.composite
def phase_lists(draw: st.DrawFn) -> SampleLayout:
    """One to eight phases of any sizes, also again and again, of which the last is plain."""
    variant = VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))]
    phases, first = [], 0
    for step in range(draw(st.integers(0, 7))):
        phases.append(Phase(step, first, draw(st.integers(2, 5)), variant))
        first += draw(st.integers(1, 12))
    return SampleLayout(draw(st.integers(1, 8)), (*phases, Phase(len(phases), first)))


layouts = phase_lists()


class Documents:
    """A corpus in memory."""

    def __init__(self, lengths: list[int]) -> None:
        tokens = np.arange(sum(lengths), dtype=np.int32)
        self.documents = np.split(tokens, np.cumsum(lengths)[:-1])
        self.sequence_lengths = np.array(lengths, dtype=np.int32)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        assert length is not None
        piece = self.documents[idx][offset : offset + length]
        assert len(piece) == length
        return piece


@given(layout=layouts)
def test_samples_tile_the_stream(layout: SampleLayout) -> None:
    position = 0
    for sample in range(layout.phases[-1].first_sample + 5):
        begin, end = layout.span(sample)
        phase = [phase for phase in layout.phases if phase.first_sample <= sample][-1]
        tokens = layout.sequence_length * (phase.bag_size if phase.reads_bags else 1)
        assert begin == position
        assert end == begin + tokens + phase.bag_size
        position = begin + tokens


@given(layout=layouts, position=st.integers(0, 300))
def test_first_sample_from_a_position(layout: SampleLayout, position: int) -> None:
    sample = 0
    while layout.span(sample)[0] < position:
        sample += 1
    assert layout.first_sample_from(position) == sample


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_an_epoch_orders_its_documents_by_itself(epochs: int) -> None:
    documents = np.arange(100, 140, dtype=np.int32)
    rows = shuffle_documents(documents, epochs, seed=7).reshape(epochs, -1)
    longer = shuffle_documents(documents, 6, seed=7).reshape(6, -1)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, longer[:epochs])
    for row in rows:
        np.testing.assert_array_equal(np.sort(row), documents)
    # Two equal rows of 40 documents by chance: 1 in 40!.
    assert len({row.tobytes() for row in longer}) == 6
    assert (shuffle_documents(documents, 1, seed=8) != rows[0]).any()


def epoch_ends(tokens: int) -> Any:
    """Of more epochs than any test reads."""
    return np.arange(1, 4000) * tokens


def long_enough(layout: SampleLayout, tokens: int) -> int:
    return max(tokens, *(layout.tokens(phase) + phase.look_ahead for phase in layout.phases))


@given(layout=layouts, tokens=st.integers(1, 150), num_samples=st.integers(1, 80))
def test_samples_are_shuffled_within_bag_size_and_epoch(
    layout: SampleLayout, tokens: int, num_samples: int
) -> None:
    tokens = long_enough(layout, tokens)
    order = shuffle_samples(layout, num_samples, epoch_ends(tokens), seed=3).tolist()
    assert len(order) == len(set(order)) == num_samples

    def group(sample: int) -> tuple[int, int]:
        return layout.span(sample)[0] // tokens, layout.phases[layout.phase_of(sample)].bag_size

    groups = [group(sample) for sample in order]
    # Reading goes group by group, each with the samples that lie there without shuffling.
    assert groups == [group(place) for place in range(num_samples)]
    for place, sample in enumerate(order):
        epoch = layout.span(sample)[0] // tokens
        if layout.span(sample)[1] > (epoch + 1) * tokens:
            assert sample == place


@given(
    layout=layouts,
    tokens=st.integers(1, 150),
    num_samples=st.integers(1, 60),
    more=st.integers(1, 40),
)
def test_a_longer_run_continues_a_shorter_one(
    layout: SampleLayout, tokens: int, num_samples: int, more: int
) -> None:
    tokens = long_enough(layout, tokens)
    shorter = shuffle_samples(layout, num_samples, epoch_ends(tokens), seed=3)
    longer = shuffle_samples(layout, num_samples + more, epoch_ends(tokens), seed=3)
    np.testing.assert_array_equal(shorter, longer[:num_samples])


def readable_documents(documents: list[int], epochs: int, seed: int) -> list[int]:
    order = []
    for epoch in range(epochs):
        of_epoch = documents.copy()
        np.random.RandomState([seed, epoch, 0]).shuffle(of_epoch)
        order += of_epoch
    return order


def readable_samples(
    layout: SampleLayout, num_samples: int, tokens_per_epoch: int, seed: int
) -> list[int]:
    order: list[int] = []
    samples = count()
    sample = next(samples)
    for epoch in count():
        epoch_end = (epoch + 1) * tokens_per_epoch
        of_size: dict[int, list[int]] = {phase.bag_size: [] for phase in layout.phases}
        while layout.span(sample)[0] < epoch_end:
            of_size[layout.phases[layout.phase_of(sample)].bag_size].append(sample)
            sample = next(samples)
        shuffled: dict[int, int] = {}
        for index, group in enumerate(of_size.values(), start=1):
            whole = [member for member in group if layout.span(member)[1] <= epoch_end]
            places = whole.copy()
            np.random.RandomState([seed, epoch, index]).shuffle(whole)
            shuffled |= dict(zip(places, whole, strict=True))
        order += [shuffled.get(place, place) for place in range(len(order), sample)]
        if len(order) >= num_samples:
            return order[:num_samples]
    raise AssertionError


@given(
    layout=layouts,
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    num_samples=st.integers(1, 60),
)
def test_the_order_is_the_readable_one(
    layout: SampleLayout, lengths: list[int], num_samples: int
) -> None:
    lengths.append(long_enough(layout, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_DOCUMENTS_AT_ONCE", 7)  # several chunks
        stream = build(layout, lengths, num_samples)
    epochs = len(stream.documents) // len(lengths)
    assert stream.documents.tolist() == readable_documents(list(range(len(lengths))), epochs, 5)
    ends = accumulate(lengths[document] for document in stream.documents.tolist())
    assert stream.starts.tolist() == [0, *ends]
    assert stream.samples.tolist() == readable_samples(layout, num_samples, sum(lengths), 5)


def test_samples_do_not_stay_in_order() -> None:
    layout = two_phases(8, 50, 4)
    order = shuffle_samples(layout, 150, epoch_ends=epoch_ends(10_000), seed=1)
    assert order.dtype == np.uint32
    assert (order[:50] != np.arange(50)).sum() > 40
    assert (order[50:] != np.arange(50, 150)).sum() > 90
    other_seed = shuffle_samples(layout, 150, epoch_ends=epoch_ends(10_000), seed=2)
    assert (order != other_seed).sum() > 100


def build(layout: SampleLayout, lengths: list[int], num_samples: int) -> TokenStream:
    return TokenStream.build(
        layout,
        np.arange(len(lengths), dtype=np.int32),
        np.array(lengths, dtype=np.int32),
        num_samples,
        seed=5,
        corpus="corpus",
    )


@given(
    layout=layouts,
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    num_samples=st.integers(1, 60),
)
def test_reading_a_span_gives_the_flat_stream(
    layout: SampleLayout, lengths: list[int], num_samples: int
) -> None:
    lengths.append(long_enough(layout, 1))
    source = Documents(lengths)
    stream = build(layout, lengths, num_samples)
    flat = np.concatenate([source.documents[document] for document in stream.documents])
    assert stream.starts[-1] == len(flat)
    # The last epoch is there because a sample needs it.
    ends = [layout.span(sample)[1] for sample in stream.samples.tolist()]
    last_start = layout.span(num_samples - 1)[0]
    assert max(*ends, last_start + 1) > len(flat) - sum(lengths)
    for sample in stream.samples.tolist():
        begin, end = layout.span(sample)
        text, documents, pieces = stream.read(source, begin, end)
        assert text.dtype == np.int64
        np.testing.assert_array_equal(text, flat[begin:end])
        owners = np.repeat(documents, pieces)
        assert all(
            token in source.documents[owner]
            for token, owner in zip(text.tolist(), owners.tolist(), strict=True)
        )


def test_a_corpus_shorter_than_a_sample_is_refused() -> None:
    layout = two_phases(8, 2, 4)
    assert len(build(layout, [36], 1).samples) == 1
    with pytest.raises(ValueError, match=r"corpus.* 35 tokens.* needs 36 .*--tst-bag-size"):
        build(layout, [35], 1)


def test_saved_arrays_are_mapped_back(tmp_path: Path) -> None:
    layout = two_phases(4, 3, 2)
    stream = build(layout, [9, 5, 20], 12)
    prefix = tmp_path / "cache" / "name.with.dots"
    stream.save(prefix)
    stream.save(prefix)
    loaded = TokenStream.load(prefix)
    for name, path in TokenStream.paths(prefix).items():
        np.testing.assert_array_equal(getattr(loaded, name), getattr(stream, name))
        assert path.is_file()
    assert not loaded.samples.flags.owndata
    assert sorted(prefix.parent.iterdir()) == sorted(TokenStream.paths(prefix).values())


def test_a_phase_2_shorter_than_the_look_ahead_of_the_last_bags() -> None:
    layout = two_phases(2, 4, 5)
    lengths = [7, 15]
    assert layout.span(3)[1] == 45
    assert layout.span(4)[1] == 43
    stream = build(layout, lengths, 5)
    assert stream.starts[-1] >= 45
    text, _, _ = stream.read(Documents(lengths), *layout.span(3))
    assert (text >= 0).all()


@given(
    bag_sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
)
def test_aligned_bags_hold_one_document_in_every_phase(
    bag_sizes: list[int], lengths: list[int]
) -> None:
    full = VARIANTS["full"]
    bags = [Phase(i, 3 * i, size, full, aligns_documents=True) for i, size in enumerate(bag_sizes)]
    plain = Phase(len(bags), 3 * len(bags))
    layout = SampleLayout(4, (*bags, plain))
    lengths.append(long_enough(layout, 1))
    source = Documents(lengths)
    stream = build(layout, lengths, plain.first_sample + 4)
    for sample in range(plain.first_sample):
        phase = layout.phases[layout.phase_of(sample)]
        begin, _ = layout.span(sample)
        text, documents, pieces = stream.read(source, begin, begin + layout.tokens(phase))
        shape = (-1, phase.bag_size)
        owners = np.repeat(documents, pieces).reshape(shape)
        for bag, owner in zip(text.reshape(shape), owners, strict=True):
            held = bag >= 0
            assert held[0]
            assert len(set(owner[held])) == 1
    # Behind the last bags nothing is filled up.
    text, _, _ = stream.read(source, layout.begins[-1], int(stream.starts[-1]))
    assert (text >= 0).all()
