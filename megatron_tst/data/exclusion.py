"""Leaves documents out of a stream of tokens, some of which may have been read.

What is left out before the first sample is no part of the stream. Later the past must stay what it
was: its samples lie scattered over the epoch. So from the resume on the run skips every sample that
holds a token of a document left out, in its text or look-ahead, and reads others instead:

* in phase 2 the samples behind move up;
* in phase 1 the text behind it is read in bags, as many samples as are missing, and phase 2 begins
  behind them.

Each step reads as many samples and tokens as planned, no sample is read twice, and a longer run
still continues a shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import TokenStream


@dataclass(frozen=True)
class Exclusion:
    """Documents of one corpus that are left out from a sample on.

    Attributes:
        first_place: samples of the corpus that were read before.
        documents: [n] their indices in the corpus.
    """

    first_place: int
    documents: NDArray[Any]


@dataclass(frozen=True)
class StreamBuilder:
    """What ``TokenStream.build`` is asked for, but for the layout and the number of samples."""

    documents: NDArray[np.int32]
    document_lengths: NDArray[np.int32]
    seed: int
    corpus: str

    def build(self, layout: SampleLayout, num_samples: int) -> TokenStream:
        """All documents in order."""
        return TokenStream.build(
            layout, self.documents, self.document_lengths, num_samples, self.seed, self.corpus
        )


def build_without(
    builder: StreamBuilder,
    layout: SampleLayout,
    num_samples: int,
    exclusions: Sequence[Exclusion],
) -> TokenStream:
    """The stream of a run that leaves documents out after a resume.

    A sample in a place of phase 1 counts in samples of phase 1, also beyond their number; one in a
    place of phase 2 as in ``layout``.

    Args:
        builder: without the documents that were left out from the start.
        layout: of the run without exclusions: two phases.
        num_samples: samples to be read.
        exclusions: in the order of their resumes.

    Raises:
        UsageError: the run would read its text once more than without them.
    """
    planned = builder.build(layout, num_samples)
    switch = layout.phases[-1].first_sample
    in_bags = [each for each in exclusions if each.first_place < switch]
    first = planned.samples[:switch].astype(np.int64)
    bags_end = switch
    while in_bags:
        moved = _with_switch_at(layout, bags_end)
        stream = builder.build(moved, num_samples + bags_end - switch)
        replaced, needed = _replace_in_phase_1(stream, moved, first, in_bags)
        # Where documents are aligned, what lies behind the bags is known once they reach so far.
        if needed <= bags_end:
            first, bags_end = replaced, needed
            break
        bags_end = needed
    wanted, margin = num_samples - len(first), 0
    while True:
        moved = _with_switch_at(layout, bags_end)
        stream = builder.build(moved, num_samples + bags_end - switch + margin)
        rest = _skip_in_phase_2(stream, moved, switch, exclusions)
        if len(rest) >= wanted:
            break
        margin += wanted - len(rest)
    if len(stream.documents) > len(planned.documents):
        raise UsageError(
            f"--tst-exclude-documents leaves too little text of {builder.corpus}: the run would "
            "read it once more than planned. Shorten the run, or leave fewer documents out."
        )
    # As they count in the layout without exclusions, whose phase 2 begins earlier.
    shift = (bags_end - switch) * (layout.phases[0].tokens_per_position - 1)
    samples = np.concatenate([first, rest[:wanted] + shift])
    dtype = np.uint32 if samples.max() < 2**32 else np.int64
    return replace(stream, samples=samples.astype(dtype))


def _with_switch_at(layout: SampleLayout, sample: int) -> SampleLayout:
    bags, plain = layout.phases
    return SampleLayout(layout.sequence_length, (bags, plain.from_sample(sample)))


def _replace_in_phase_1(
    stream: TokenStream,
    layout: SampleLayout,
    order: NDArray[np.int64],
    exclusions: Sequence[Exclusion],
) -> tuple[NDArray[np.int64], int]:
    """The order of phase 1 with others in the place of what is skipped, and the sample behind."""
    end, left_out = len(order), np.zeros(0, dtype=np.int64)
    for exclusion in exclusions:
        found = stream.samples_with(exclusion.documents, layout, 0)
        left_out = np.union1d(left_out, found)
        past, rest = np.split(order, [exclusion.first_place])
        rest = rest[~np.isin(rest, left_out)]
        others: list[int] = []
        while len(others) < len(order) - len(past) - len(rest):
            if end not in left_out:
                others.append(end)
            end += 1
        order = np.concatenate([past, rest, np.array(others, dtype=np.int64)])
    return order, end


def _skip_in_phase_2(
    stream: TokenStream, layout: SampleLayout, switch: int, exclusions: Sequence[Exclusion]
) -> NDArray[np.int64]:
    """The order of phase 2 without what is skipped."""
    order = stream.samples[layout.phases[-1].first_sample :].astype(np.int64)
    for exclusion in exclusions:
        past, rest = np.split(order, [max(exclusion.first_place - switch, 0)])
        left_out = stream.samples_with(exclusion.documents, layout, 1)
        order = np.concatenate([past, rest[~np.isin(rest, left_out)]])
    return order
