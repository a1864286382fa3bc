"""Looks at some master weights of a checkpoint: in a second, whatever its size."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from megatron_tst.checkpoint.findings import MASTERS, Verification
from megatron_tst.checkpoint.saved_state import SavedState, comparison_of_masters
from megatron_tst.checkpoint.stored_shards import StoredShard

_SHARDS = 64
# At the beginning and at the end of each.
_ELEMENTS = 2048


def sample_masters(state: SavedState, args: Namespace) -> Verification:
    """Compares masters at both ends of up to 64 stored parts, spread over the model, with weights.

    Finds what is wrong with a large share of them, such as masters saved at wrong places. Looks at
    nothing where the optimizer's state is in buckets.

    Args:
        state: tensors of the checkpoint.
        args: of the run that saved.

    Raises:
        UsageError: a file cannot be read.
    """
    result = Verification(state.source.folder)
    pairs, compare = list(_pairs(state)), comparison_of_masters(args)
    for master, shard in pairs[:: max(1, -(-len(pairs) // _SHARDS))]:
        for start, end in _ends(master.elements):
            masters = torch.cat(list(master.pieces(start, end)))
            weights = torch.cat(list(shard.pieces(start, end)))
            wrong, _ = compare(masters, weights)
            text = "the masters are those of other weights"
            result.count(MASTERS, shard.key, wrong, end - start, text)
    return result


def _pairs(state: SavedState) -> Iterator[tuple[StoredShard, StoredShard]]:
    for weight in state.weights.values():
        for master in weight.masters:
            if master.elements and (shard := weight.by_box.get(master.box)):
                yield master, shard


def _ends(elements: int) -> list[tuple[int, int]]:
    if elements <= 2 * _ELEMENTS:
        return [(0, elements)]
    return [(0, _ELEMENTS), (elements - _ELEMENTS, elements)]
