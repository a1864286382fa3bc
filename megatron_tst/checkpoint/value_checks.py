"""Goes through the numbers of a checkpoint once, and notes what is wrong with them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from math import inf
from pathlib import Path

from torch import Tensor

from megatron_tst.checkpoint.bucket_mapping import FoundWeight, WeightBeginnings, find_weights
from megatron_tst.checkpoint.findings import (
    CHECKSUMS,
    FINITE,
    MASTERS,
    MOMENTS,
    NEGATIVE,
    TORN,
    ZERO_MASTERS,
    Verification,
)
from megatron_tst.checkpoint.saved_state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    SavedState,
    SavedWeight,
    arguments_that_round,
    comparison_of_masters,
    master_shards,
)
from megatron_tst.checkpoint.saved_values import (
    MOST_TORN_ROWS,
    count_negative,
    count_not_finite,
    count_other_moments,
    moments_bound,
    torn_rows,
)
from megatron_tst.checkpoint.stored_shards import StoredShard
from megatron_tst.common.progress import CountCallback

# A shorter part of a bucket may be padding, into which nothing was ever written.
_LONGEST_PADDING = 64
_MEGABYTE = 1_000_000


def check_values(
    state: SavedState, result: Verification, args: Namespace, on_progress: CountCallback
) -> None:
    """Looks at all numbers of all tensors.

    Args:
        state: the tensors.
        result: takes what is found.
        args: of the run that saved.
        on_progress: called with the megabytes that are read, and their number.
    """
    reader = _Reader(result, on_progress)
    if flags := arguments_that_round(args):
        result.notes.append(
            f"weights are only near their masters with {' and '.join(flags)}: what is far is wrong"
        )
    checks = _Checks(result, reader, _bound(args), comparison_of_masters(args))
    for weight in state.weights.values():
        checks.check_weight(weight)
    if state.buckets:
        shards = [shard for weight in state.weights.values() for shard in weight.shards]
        checks.check_buckets(state.buckets, shards)
    elif not any(weight.state for weight in state.weights.values()):
        result.notes.append("there is no state of an optimizer in it")
    reader.check_checksums()


def _bound(args: Namespace) -> float:
    """Of Adam's first moment by its second one; infinite where they are rounded, or not Adam's."""
    kinds = (str(getattr(args, f"{name}_dtype", "fp32")) for name in ("exp_avg", "exp_avg_sq"))
    # Validation makes dtypes of the names.
    if any(kind not in ("fp32", "torch.float32") for kind in kinds):
        return inf
    if getattr(args, "optimizer", None) != "adam":
        return inf
    return moments_bound(args.adam_beta1, args.adam_beta2)


class _Reader:
    """Reads shards, and looks at what every number must be."""

    def __init__(self, result: Verification, on_progress: CountCallback) -> None:
        self._result = result
        self._on_progress = on_progress
        self._done = 0
        self._checksums: dict[StoredShard, bool] = {}

    def read(self, shard: StoredShard) -> Iterator[Tensor]:
        """All of a shard in pieces; nothing more where it cannot be read, which is a fault."""

        def keep(is_right: bool) -> None:
            self._checksums[shard] = is_right

        pieces = shard.pieces(on_checksum=keep)
        while True:
            try:
                piece = next(pieces, None)
            except (ValueError, OSError) as error:
                self._result.count(CHECKSUMS, shard.key, 1, 1, _short(error, shard.path))
                return
            if piece is None:
                return
            self._done += piece.nbytes
            total = max(self._result.bytes, self._done)
            self._on_progress(self._done // _MEGABYTE, total // _MEGABYTE)
            bad = count_not_finite(piece)
            self._result.count(FINITE, shard.key, bad, len(piece), "NaN or infinite")
            yield piece

    def read_together(self, *shards: StoredShard) -> Iterator[tuple[Tensor, ...]]:
        """Pieces of several shards of one shape, as long as all can be read."""
        # Not zip, which leaves the others before their ends, where checksums are compared.
        for pieces in zip_longest(*map(self.read, shards)):
            if all(piece is not None for piece in pieces):
                yield pieces

    def check_checksums(self) -> None:
        """Compares the checksums, unless torch was told to write none (then there are others)."""
        if not any(self._checksums.values()):
            return
        for shard, is_right in self._checksums.items():
            text = f"in {shard.path.name}: the bytes are not the ones that were written"
            self._result.count(CHECKSUMS, shard.key, int(not is_right), 1, text)


class _Checks:
    """What numbers must be to each other."""

    def __init__(
        self,
        result: Verification,
        reader: _Reader,
        bound: float,
        compare: Callable[[Tensor, Tensor], tuple[int, int]],
    ) -> None:
        self._result = result
        self._reader = reader
        self._bound = bound
        self._compare = compare

    def check_weight(self, weight: SavedWeight) -> None:
        """A weight and what the optimizer has of it."""
        shards = dict(weight.by_box)
        apart = []
        for master in weight.masters:
            if master.box not in shards:
                apart.append(master)
                continue
            for masters, weights in self._reader.read_together(master, shards.pop(master.box)):
                self._count_masters(weight.key, masters, weights)
        if apart:
            self._result.notes.append(
                f"{len(apart)} of {len(weight.masters)} parts of the masters of {weight.key} are "
                "no parts of it, and were not compared"
            )
        self._read_alone([*apart, *shards.values()])
        first, second = (weight.state.get(name, []) for name in (FIRST_MOMENT, SECOND_MOMENT))
        self._check_moments(first, second, has_rows=True)
        for name, others in weight.state.items():
            if name not in (FIRST_MOMENT, SECOND_MOMENT) and others is not weight.masters:
                self._read_alone(others)

    def check_buckets(
        self, buckets: dict[str, dict[str, list[StoredShard]]], weights: list[StoredShard]
    ) -> None:
        """The format in which masters and moments are without the names of their weights."""
        beginnings = WeightBeginnings(weights)
        left = 0
        for bucket in buckets.values():
            found = []
            masters = master_shards(bucket)
            for part in find_weights(masters, beginnings):
                found.append(part)
                key, elements = part.shard.key, part.shard.elements
                self._count_masters_at(key, part.wrong, part.zeros, elements)
            left += sum(shard.elements for shard in masters)
            left -= sum(part.shard.elements for part in found)
            used = {name: _written(shards, found) for name, shards in bucket.items()}
            first, second = (used.pop(name, []) for name in (FIRST_MOMENT, SECOND_MOMENT))
            self._read_alone(chain(*used.values()))
            self._check_moments(first, second, has_rows=False)
        self._judge_the_rest(weights, beginnings, left)

    def _judge_the_rest(
        self, weights: list[StoredShard], beginnings: WeightBeginnings, left: int
    ) -> None:
        """Weights that no bucket has masters of, and numbers in buckets of no weight."""
        found_keys = {shard.key for shard in beginnings.found}
        lost = [shard for shard in weights if shard not in beginnings.found]
        of_known = [shard for shard in lost if shard.key in found_keys]
        if sum(shard.elements for shard in of_known) <= left:
            for shard in of_known:
                self._count_masters_at(shard.key, shard.elements, 0, shard.elements)
        unknown = {shard.key for shard in lost} - found_keys
        if unknown:
            self._result.notes.append(
                f"the masters of {len(unknown)} tensors were not found in the buckets and not "
                f"compared: {', '.join(sorted(unknown)[:5])}{', ...' if len(unknown) > 5 else ''}"
            )

    def _count_masters(self, key: str, masters: Tensor, weights: Tensor) -> None:
        self._count_masters_at(key, *self._compare(masters, weights), len(masters))

    def _count_masters_at(self, key: str, wrong: int, zeros: int, of: int) -> None:
        text = "the masters are those of other weights"
        self._result.count(MASTERS, key, wrong, of, text)
        self._result.count(
            ZERO_MASTERS, key, zeros, of, "the masters are zero, the weights are not"
        )

    def _check_moments(
        self, first: list[StoredShard], second: list[StoredShard], has_rows: bool
    ) -> None:
        by_box = {shard.box: shard for shard in first}
        for shard in second:
            other = by_box.pop(shard.box, None)
            shards = (shard,) if other is None else (shard, other)
            torn = begin = 0
            for squares, *means in self._reader.read_together(*shards):
                self._compare_moments(shard.key, squares, means)
                if has_rows:
                    torn += _count_torn(squares, begin, shard.sizes[-1])
                    begin += len(squares)
            if has_rows:
                torn = torn if torn <= MOST_TORN_ROWS else 0
                rows = shard.elements // shard.sizes[-1]
                self._result.count(TORN, shard.key, torn, rows, "zero in a part of a row")
        self._read_alone(by_box.values())

    def _compare_moments(self, key: str, squares: Tensor, means: list[Tensor]) -> None:
        self._result.count(NEGATIVE, key, count_negative(squares), len(squares), "below zero")
        if means and self._bound < inf:
            beyond = count_other_moments(means[0], squares, self._bound)
            text = f"the {FIRST_MOMENT} is larger than it allows"
            self._result.count(MOMENTS, key, beyond, len(squares), text)

    def _read_alone(self, shards: Iterable[StoredShard]) -> None:
        for shard in shards:
            for _ in self._reader.read(shard):
                pass


def _count_torn(squares: Tensor, begin: int, columns: int) -> int:
    """In the rows that a piece has whole.

    Args:
        squares: the piece.
        begin: numbers of the tensor before it.
        columns: of a row.
    """
    start = -begin % columns
    end = start + (len(squares) - start) // columns * columns
    return torn_rows(squares[start:end], columns) if end > start else 0


def _written(shards: list[StoredShard], found: list[FoundWeight]) -> list[StoredShard]:
    """Without what may be padding, of which nobody says what it holds."""

    def is_written(shard: StoredShard) -> bool:
        first = shard.offsets[0]
        last = first + shard.elements
        return shard.elements >= _LONGEST_PADDING or any(
            part.start < last and first < part.end for part in found
        )

    return [shard for shard in shards if is_written(shard)]


def _short(error: Exception, path: Path) -> str:
    return " ".join(str(error).removeprefix(f"{path}: ").split())
