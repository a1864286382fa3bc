"""Documents that are left out of a stream, from its start or while it is read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_tst.data.bag_dataset import ArraySource
from megatron_tst.data.exclusion import Exclusion, StreamBuilder, build_without
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import PADDING, TokenStream
from megatron_tst.settings.phases import Phase

LENGTH, BAG_SIZE, SWITCH, SAMPLES = 4, 3, 10, 30
LENGTHS = np.random.RandomState(3).randint(0, 40, 40).astype(np.int32)
ENDS = LENGTHS.cumsum()
# Every token has an id of its own.
SOURCE = ArraySource(np.arange(ENDS[-1]), ENDS)
BUILDER = StreamBuilder(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS, 5, "text")


# Bag size and first sample of each stretch: one size, a schedule, and sizes that are drawn.
STRETCHES = {
    "one": [(BAG_SIZE, 0)],
    "schedule": [(4, 0), (2, 2), (3, 7)],
    "drawn": [(2, 0), (4, 1), (2, 3), (4, 4), (2, 6), (4, 9)],
}


def layout_of(aligns: bool, sizes: str = "one") -> SampleLayout:
    bags = [
        Phase(first, first, bag_size=size, aligns_documents=aligns)
        for size, first in STRETCHES[sizes]
    ]
    return SampleLayout(LENGTH, (*bags, Phase(SWITCH, SWITCH)))


def texts(stream: TokenStream, layout: SampleLayout) -> list[np.ndarray]:
    """The tokens of each place, look-ahead included."""
    return [
        stream.read(SOURCE, *layout.with_more_bags(stream.more_bags).span(int(sample)))[0]
        for sample in stream.samples
    ]


def own(text: np.ndarray, layout: SampleLayout, place: int) -> list[int]:
    tokens = text[: len(text) - layout.phases[layout.phase_of(place)].look_ahead]
    return [token for token in tokens.tolist() if token != PADDING]


def document_of(token: int) -> int:
    return int(ENDS.searchsorted(token, side="right"))


@pytest.mark.parametrize("aligns", [False, True])
@pytest.mark.parametrize("sizes", STRETCHES)
@pytest.mark.parametrize("resumes", [[0], [3], [SWITCH], [17], [2, 6], [4, 20], [3, 8, 15, 25]])
def test_the_past_is_kept_and_the_rest_is_clean(
    resumes: list[int], sizes: str, aligns: bool
) -> None:
    layout = layout_of(aligns, sizes)
    planned = BUILDER.build(layout, SAMPLES)
    past = texts(planned, layout)
    exclusions: list[Exclusion] = []
    absent: set[int] = set()
    for first in resumes:
        # Two that are to be read, and one that was.
        wanted = [past[min(first + 2, SAMPLES - 1)], past[-1], past[max(first - 1, 0)]]
        documents = sorted({document_of(int(text[text != PADDING][0])) for text in wanted})
        exclusions.append(Exclusion(first, np.array(documents)))
        absent |= set(documents)
        stream = build_without(BUILDER, layout, SAMPLES, exclusions)
        found = texts(stream, layout)
        assert len(found) == SAMPLES
        for place in range(first):
            assert own(found[place], layout, place) == own(past[place], layout, place)
        for place in range(first, SAMPLES):
            tokens = [token for token in found[place].tolist() if token != PADDING]
            assert not absent & {document_of(token) for token in tokens}
            assert len(found[place]) == len(past[place])
        counts = Counter(t for place, text in enumerate(found) for t in own(text, layout, place))
        assert set(counts.values()) == {1}
        past = found


@pytest.mark.parametrize("aligns", [False, True])
@pytest.mark.parametrize("sizes", STRETCHES)
def test_a_longer_run_continues_a_shorter_one(sizes: str, aligns: bool) -> None:
    layout = layout_of(aligns, sizes)
    exclusions = [Exclusion(3, np.array([2, 5, 9])), Exclusion(14, np.array([20]))]
    short, long = (build_without(BUILDER, layout, n, exclusions) for n in (20, SAMPLES))
    assert short.samples.tolist() == long.samples[:20].tolist()
    for one, other in zip(texts(short, layout), texts(long, layout), strict=False):
        assert one.tolist() == other.tolist()


def test_aligned_bags_keep_to_their_document() -> None:
    layout = layout_of(aligns=True)
    stream = build_without(BUILDER, layout, SAMPLES, [Exclusion(1, np.arange(12))])
    # Some samples come from behind the planned end of phase 1.
    assert stream.samples[:SWITCH].max() >= SWITCH
    for text in texts(stream, layout)[1:SWITCH]:
        for bag in text.reshape(-1, BAG_SIZE):
            assert len({document_of(int(token)) for token in bag if token != PADDING}) <= 1


def test_nothing_left_out_changes_nothing() -> None:
    layout = layout_of(aligns=False)
    planned = BUILDER.build(layout, SAMPLES)
    empty = int(np.flatnonzero(LENGTHS == 0)[0]) if (LENGTHS == 0).any() else None
    documents = np.array([] if empty is None else [empty], dtype=np.int64)
    stream = build_without(BUILDER, layout, SAMPLES, [Exclusion(4, documents)])
    for name in ("documents", "starts", "samples"):
        assert np.array_equal(getattr(stream, name), getattr(planned, name))


def test_text_that_does_not_suffice_is_refused() -> None:
    layout = layout_of(aligns=False)
    places = SWITCH + (ENDS[-1] - SWITCH * LENGTH * BAG_SIZE) // LENGTH - 2
    with pytest.raises(ValueError, match=r"leaves too little text of text: .* once more than"):
        build_without(BUILDER, layout, int(places), [Exclusion(3, np.arange(9))])


def test_samples_of_documents() -> None:
    """Against reading every sample."""
    layout = layout_of(aligns=False, sizes="schedule")
    stream = BUILDER.build(layout, SAMPLES)
    samples = np.arange(SAMPLES)
    held = [
        {document_of(t) for t in stream.read(SOURCE, *layout.span(sample))[0]}
        for sample in range(SAMPLES)
    ]
    for document in range(len(LENGTHS)):
        found = stream.holds(np.array([document]), layout, samples)
        assert found.tolist() == [document in documents for documents in held]
