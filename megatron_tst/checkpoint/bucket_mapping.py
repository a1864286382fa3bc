"""Finds the weights in the buckets of the distributed optimizer's default format.

A bucket is a row of master weights in an order that depends on the modules of the model, which the
files do not have. But each weight tells where its masters are: they round to it. So each place of a
bucket where a parameter can begin is looked up among the beginnings of all weights, and what begins
alike is compared as a whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tst.checkpoint.saved_values import count_other_weights
from megatron_tst.checkpoint.stored_shards import StoredShard

# Megatron begins parameters at multiples of it.
_ALIGNMENT = 64
# As many numbers of a weight as tell it from others.
_COMPARED = 32
_MOST_CANDIDATES = 8


@dataclass(frozen=True)
class FoundWeight:
    """Masters of a weight in a bucket.

    Attributes:
        shard: of the weight.
        start: of its masters in the bucket.
        wrong: weights that are not the rounded values of their masters.
        zeros: how many of these masters are zero.
    """

    shard: StoredShard
    start: int
    wrong: int
    zeros: int

    @property
    def end(self) -> int:
        """Behind its last master."""
        return self.start + self.shard.elements


class WeightBeginnings:
    """The first numbers of each stored part of each weight.

    Args:
        shards: of the weights; a few numbers of each are read.

    Attributes:
        found: those whose masters were found.
    """

    def __init__(self, shards: Iterable[StoredShard]) -> None:
        self.found: set[StoredShard] = set()
        self._by_start: dict[tuple[torch.dtype, bytes], list[StoredShard]] = defaultdict(list)
        self._lengths: set[tuple[torch.dtype, int]] = set()
        for shard in shards:
            length = min(_COMPARED, shard.elements)
            if not length or not shard.dtype.is_floating_point or shard.dtype.itemsize < 2:
                continue
            values = torch.cat(list(shard.pieces(0, length)))
            self._by_start[shard.dtype, _bytes(values)].append(shard)
            self._lengths.add((shard.dtype, length))

    def candidates(self, masters: Tensor) -> list[StoredShard]:
        """Parts of weights that begin with these masters, the longest beginnings first."""
        found: list[StoredShard] = []
        for dtype, length in sorted(self._lengths, key=lambda known: -known[1]):
            if length <= len(masters):
                found += self._by_start.get((dtype, _bytes(masters[:length].to(dtype))), [])
        return found


@dataclass
class _Row:
    """The numbers of a bucket."""

    shards: Sequence[StoredShard]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [shard.offsets[0] for shard in self.shards]

    @property
    def bounds(self) -> set[int]:
        """Where stored parts begin and end, and so every parameter of the model."""
        return {bound for s in self.shards for bound in (s.offsets[0], s.offsets[0] + s.elements)}

    def pieces(self, start: int, end: int) -> Iterator[Tensor]:
        """Numbers of the row; ends at a gap."""
        index = max(0, bisect_right(self.starts, start) - 1)
        for shard in self.shards[index:]:
            first = shard.offsets[0]
            if start >= end or not first <= start < first + shard.elements:
                return
            last = min(end, first + shard.elements)
            yield from shard.pieces(start - first, last - first)
            start = last


def find_weights(
    masters: Sequence[StoredShard], beginnings: WeightBeginnings
) -> Iterator[FoundWeight]:
    """Walks along a bucket and finds the weights whose masters are in it.

    Memory: a few megabytes.

    Args:
        masters: of the bucket, by place.
        beginnings: of all weights.
    """
    row = _Row(masters)
    bounds = row.bounds
    cursor, end = 0, max(bounds, default=0)
    while cursor < end:
        found = _find_at(row, cursor, beginnings, bounds)
        if found is None and cursor % _ALIGNMENT:
            cursor += -cursor % _ALIGNMENT
            continue
        if found is None:
            # In the middle of a parameter of another rank nothing is found either.
            cursor = min((start for start in row.starts if start > cursor), default=end)
            continue
        beginnings.found.add(found.shard)
        yield found
        cursor = found.end


def _find_at(
    row: _Row, start: int, beginnings: WeightBeginnings, bounds: set[int]
) -> FoundWeight | None:
    masters = list(row.pieces(start, start + _COMPARED))
    if not masters:
        return None
    candidates = beginnings.candidates(torch.cat(masters))
    # All norms may still be ones: then the place of the end tells them apart, and in the end each
    # is found.
    candidates.sort(
        key=lambda shard: (start + shard.elements not in bounds, shard in beginnings.found)
    )
    best = None
    for shard in candidates[:_MOST_CANDIDATES]:
        found = _compare(row, start, shard)
        if found and (best is None or found.wrong < best.wrong):
            best = found
        if best and not best.wrong:
            break
    return best


def _compare(row: _Row, start: int, shard: StoredShard) -> FoundWeight | None:
    wrong = zeros = done = 0
    for masters in row.pieces(start, start + shard.elements):
        weights = torch.cat(list(shard.pieces(done, done + len(masters))))
        counts = count_other_weights(masters, weights)
        wrong, zeros, done = wrong + counts[0], zeros + counts[1], done + len(masters)
    if done < shard.elements:
        return None
    return FoundWeight(shard, start, wrong, zeros)


def _bytes(values: Tensor) -> bytes:
    # Minus zero is zero.
    return (values + 0).view(torch.uint8).numpy().tobytes()
