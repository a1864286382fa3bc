"""Leaves documents out of a stream of tokens, some of which may have been read.

What is left out before the first sample is no part of the stream. Later the past must stay what it
was: its samples lie scattered over the epoch. So from the resume on the run skips every sample that
holds a token of a document left out, in its text or look-ahead, and reads others instead:

* in phase 2 the samples behind move up;
* in phase 1 the text behind it is read in bags, of each size as many samples as are missing, and
  phase 2 begins behind them.

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

    Args:
        builder: without the documents that were left out from the start.
        layout: of the run without exclusions.
        num_samples: samples to be read.
        exclusions: in the order of their resumes.

    Raises:
        UsageError: the run would read its text once more than without them.
    """
    planned = builder.build(layout, num_samples)
    switch = layout.phases[-1].first_sample
    bags, more = planned.samples[:switch].astype(np.int64), _NOTHING
    left_out = np.zeros(0, dtype=np.int64)
    for exclusion in exclusions:
        left_out = np.union1d(left_out, exclusion.documents)
        if exclusion.first_place < switch:
            past, rest = np.split(bags, [exclusion.first_place])
            rest, more = _replace_bags(builder, layout, past, rest, more, left_out)
            bags = np.concatenate([past, rest])
    moved = layout.with_more_bags(more.tolist())
    wanted, first_plain = num_samples - len(bags), moved.phases[-1].first_sample
    margin = 0
    while True:
        stream = builder.build(moved, first_plain + wanted + margin)
        plain = _without(stream, moved, switch, exclusions)
        if len(plain) >= wanted:
            break
        margin += wanted - len(plain)
    if len(stream.documents) > len(planned.documents):
        raise UsageError(
            f"--tst-exclude-documents leaves too little text of {builder.corpus}: the run would "
            "read it once more than planned. Shorten the run, or leave fewer documents out."
        )
    samples = np.concatenate([bags, plain[:wanted]])
    dtype = np.uint32 if samples.max() < 2**32 else np.int64
    return replace(stream, samples=samples.astype(dtype), more_bags=more)


_NOTHING = np.zeros((0, 2), dtype=np.int64)


def _replace_bags(
    builder: StreamBuilder,
    layout: SampleLayout,
    past: NDArray[np.int64],
    rest: NDArray[np.int64],
    more: NDArray[np.int64],
    left_out: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Puts others in the place of the samples with bags that hold documents left out.

    Args:
        builder: of the stream.
        layout: of the run without exclusions.
        past: samples that have been read.
        rest: samples of bags that have not.
        more: bags behind those of the run, as ``TokenStream.more_bags``.
        left_out: documents.

    Returns:
        The rest, those that stay moved up among the places of their size; and ``more``, with as
        many further bags as it takes.
    """
    switch = len(past) + len(rest)
    sizes = _sizes(layout, np.arange(len(past), switch))
    while True:
        moved = layout.with_more_bags(more.tolist())
        behind = moved.phases[-1].first_sample
        stream = builder.build(moved, behind + 1)
        spare = np.setdiff1d(np.arange(switch, behind), np.concatenate([past, rest]))
        # What lies behind decides where aligned documents begin, so all are looked at again.
        usable = np.concatenate([rest, spare])
        usable = usable[~stream.holds(left_out, moved, usable)]
        of_size = _sizes(moved, usable)
        found = {size: usable[of_size == size] for size in dict.fromkeys(sizes.tolist())}
        missing = [
            (size, count)
            for size, samples in found.items()
            if (count := int((sizes == size).sum()) - len(samples)) > 0
        ]
        if not missing:
            break
        more = np.concatenate([more, np.array(missing, dtype=np.int64)])
    replaced = rest.copy()
    for size, samples in found.items():
        replaced[sizes == size] = samples[: int((sizes == size).sum())]
    return replaced, more


def _sizes(layout: SampleLayout, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Their bag sizes."""
    firsts = np.array([phase.first_sample for phase in layout.phases])
    sizes = np.array([phase.bag_size for phase in layout.phases])
    found: NDArray[np.int64] = sizes[firsts.searchsorted(samples, side="right") - 1]
    return found


def _without(
    stream: TokenStream, layout: SampleLayout, switch: int, exclusions: Sequence[Exclusion]
) -> NDArray[np.int64]:
    """The order of the plain samples without what is skipped."""
    order = stream.samples[layout.phases[-1].first_sample :].astype(np.int64)
    for exclusion in exclusions:
        past, rest = np.split(order, [max(exclusion.first_place - switch, 0)])
        left_out = stream.holds(exclusion.documents, layout, rest)
        order = np.concatenate([past, rest[~left_out]])
    return order
