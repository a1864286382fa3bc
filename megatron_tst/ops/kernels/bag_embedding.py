"""Triton kernels of the bag embedding over one vocabulary shard.

The mean of a bag is gathered and summed in one pass. Its gradient is a sum over the occurrences of
each token, made deterministic by sorting them instead of adding atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tst.ops.kernels.launch import next_power_of_2, on_device, require_rows

# Bytes of a row that one program reads: 16 for each thread of 4 warps.
_BLOCK_BYTES = 2048
# Occurrences of one token that are summed one after another; those of a frequent token are cut
# into pieces of this size, which run in parallel. The sums of the pieces need
# n * s * h * 4 / 128 bytes, as if every piece belonged to a frequent token.
_PIECE = 128


def bag_mean(
    weight: Tensor, rows: Tensor, absent: Tensor | None = None, divisors: Tensor | None = None
) -> Tensor:
    """Mean over each bag of this shard's rows, without a [n, s, h] tensor.

    Reads the rows of a bag that are not absent (2 or 4 bytes an element) and writes one. Sums in
    float32 in the order of the bag, divides as IEEE demands and rounds once: the bits of the torch
    path.

    Args:
        weight: [v, h] float32, bfloat16 or float16; any row stride. Local to the rank.
        rows: [n, s] int64 rows of the weight. A row outside of it gives NaN.
        absent: [n, s] bool, places that contribute nothing, whatever their row: another shard's
            tokens, or no token. ``None`` when there are none.
        divisors: [n] float32, what to divide the sums by; ``None`` means s.

    Returns:
        [n, h] in the weight's dtype, local to the rank.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    require_rows("weight", weight)
    _require_bags(rows, absent, divisors)
    (n, s), (v, h) = rows.shape, weight.shape
    out = torch.empty(n, h, dtype=weight.dtype, device=weight.device)
    if out.numel():
        block, num_warps = block_shape(h, weight.dtype)
        with on_device(weight):
            _mean_kernel[(n, triton.cdiv(h, block))](
                weight,
                rows.contiguous(),
                _contiguous(absent),
                _contiguous(divisors),
                out,
                v,
                h,
                weight.stride(0),
                s=s,
                block=block,
                num_warps=num_warps,
            )
    return out


def bag_mean_backward(
    grad: Tensor,
    rows: Tensor,
    absent: Tensor | None,
    divisors: Tensor | None,
    num_rows: int,
    add_to: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`bag_mean`: adds ``grad / divisor`` once for each occurrence of a row.

    Reads one gradient row an occurrence, fills the result with zeros and writes the rows that occur
    (2 or 4 bytes an element), or adds these to a sum and touches none of its others; beside it,
    sorts n * s integers. No atomics: the sums run in float32
    in a fixed order (offset by offset and bag by bag, in pieces of 128 where a token is frequent)
    and are rounded once, so that they repeat bit for bit. Where the divisor is s, it divides the
    sum.

    Args:
        grad: [n, h] float32, bfloat16 or float16, local to the rank; copied where its columns do
            not lie next to each other, as in the expanded gradient of a sum.
        rows: [n, s] int64; a row outside of the weight gets nothing.
        absent: [n, s] bool or ``None``, as in the forward.
        divisors: [n] float32 or ``None``, as in the forward.
        num_rows: v, rows of the weight.
        add_to: [v, h] float32, bfloat16 or float16, to which the gradient is added in float32
            before it is rounded. ``None`` allocates.

    Returns:
        [v, h] in the gradient's dtype, local to the rank; zero for rows that do not occur.
        ``add_to`` if given.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    require_rows("grad", grad)
    _require_bags(rows, absent, divisors)
    if len(grad) != len(rows):
        raise ValueError(
            f"grad {tuple(grad.shape)} does not fit rows {tuple(rows.shape)}: pass one gradient "
            "row a bag."
        )
    (n, s), h = rows.shape, grad.shape[1]
    out = add_to
    if out is None:
        out = torch.zeros(num_rows, h, dtype=grad.dtype, device=grad.device)
    elif out.shape != (num_rows, h) or not out.is_contiguous():
        raise ValueError(
            f"add_to {tuple(out.shape)} of strides {out.stride()} does not fit: pass a contiguous "
            f"{(num_rows, h)}."
        )
    require_rows("add_to", out)
    if not out.numel() or not rows.numel():
        return out
    sorted_rows, bags, starts = _sort_occurrences(rows, absent, num_rows)
    divisors = _contiguous(divisors)
    block, num_warps = block_shape(h, grad.dtype)
    blocks, pieces = triton.cdiv(h, block), n * s // _PIECE
    partial = torch.empty(pieces, h, dtype=torch.float32, device=grad.device)
    sizes = {"piece": _PIECE, "block": block, "num_warps": num_warps}
    with on_device(grad):
        if pieces:
            _piece_kernel[(pieces, blocks)](
                grad, sorted_rows, bags, divisors, partial, num_rows, h, grad.stride(0), **sizes
            )
        # One program an occurrence, of which the first of each row does its work.
        _row_kernel[(n * s, blocks)](
            grad,
            sorted_rows,
            bags,
            starts,
            divisors,
            partial,
            out,
            float(s),
            num_rows,
            h,
            grad.stride(0),
            adds=add_to is not None,
            **sizes,
        )
    return out


def block_shape(h: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of a block and warps, for rows of h elements."""
    block = min(next_power_of_2(h), _BLOCK_BYTES // dtype.itemsize)
    return block, max(1, block * dtype.itemsize // 512)


def _require_bags(rows: Tensor, absent: Tensor | None, divisors: Tensor | None) -> None:
    fits = rows.dim() == 2 and rows.shape[1] > 0
    fits &= absent is None or absent.shape == rows.shape
    if not fits or (divisors is not None and divisors.shape != rows.shape[:1]):
        given = [None if t is None else tuple(t.shape) for t in (absent, divisors)]
        raise ValueError(
            f"rows {tuple(rows.shape)}, absent {given[0]} and divisors {given[1]} do not fit: "
            "pass [n, s], s >= 1, [n, s] or None, and [n] or None."
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sort_occurrences(
    rows: Tensor, absent: Tensor | None, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and bag of each occurrence, by row, and where each row starts [v + 1]; never waits."""
    # Offset by offset, as the torch path adds them; a stable sort keeps that order within a row.
    keys = rows.t()
    if absent is not None:
        keys = keys.masked_fill(absent.t(), num_rows)
    sorted_rows, order = keys.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_rows + 1, device=rows.device)
    return sorted_rows, order.remainder_(rows.shape[0]), torch.searchsorted(sorted_rows, bounds)


@triton.jit
def _mean_kernel(
    weight: tl.tensor,
    rows: tl.tensor,
    absent: tl.tensor,
    divisors: tl.tensor,
    out: tl.tensor,
    v: tl.tensor,
    h: tl.tensor,
    weight_stride: tl.tensor,
    s: tl.constexpr,
    block: tl.constexpr,
) -> None:
    bag = tl.program_id(0).to(tl.int64)  # n * h and v * h may exceed 32 bits
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < h
    total = tl.zeros([block], tl.float32)
    for i in tl.static_range(s):  # unrolled: all rows are on their way before the first addition
        row = tl.load(rows + bag * s + i)
        missing = float("nan")
        if absent is not None:
            is_absent = tl.load(absent + bag * s + i)
            row = tl.where(is_absent, -1, row)
            missing = tl.where(is_absent, 0.0, missing)
        # As wide as the block: the interpreter of Triton 3.9 takes no other condition beside it.
        rows_of_block = row + tl.zeros([block], tl.int64)
        readable = inside & (rows_of_block >= 0) & (rows_of_block < v)
        total += tl.load(weight + row * weight_stride + columns, mask=readable, other=missing).to(
            tl.float32
        )
    total = tl.div_rn(total, 1.0 * s if divisors is None else tl.load(divisors + bag))
    tl.store(out + bag * h + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_occurrences(
    total: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    grad: tl.tensor,
    bags: tl.tensor,
    divisors: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    grad_stride: tl.tensor,
) -> tl.tensor:
    # Unrolled, because each addition would otherwise wait for two reads, one after the other.
    for k in tl.range(first, last, loop_unroll_factor=4):
        bag = tl.load(bags + k)
        share = tl.load(grad + bag * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if divisors is not None:
            share = tl.div_rn(share, tl.load(divisors + bag))
        total += share
    return total


@triton.jit
def _piece_kernel(
    grad: tl.tensor,
    sorted_rows: tl.tensor,
    bags: tl.tensor,
    divisors: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    h: tl.tensor,
    grad_stride: tl.tensor,
    piece: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The sum of a piece whose occurrences are all of one row; nothing for other pieces."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < h
    first = index * piece
    row = tl.load(sorted_rows + first)
    last_row = tl.load(sorted_rows + first + piece - 1)
    if (row == last_row) & (row >= 0) & (row < num_rows):
        total = tl.zeros([block], tl.float32)
        total = _add_occurrences(
            total, first, first + piece, grad, bags, divisors, columns, inside, grad_stride
        )
        tl.store(partial + index * h + columns, total, mask=inside)


@triton.jit
def _row_kernel(
    grad: tl.tensor,
    sorted_rows: tl.tensor,
    bags: tl.tensor,
    starts: tl.tensor,
    divisors: tl.tensor,
    partial: tl.tensor,
    out: tl.tensor,
    bag_size: tl.tensor,
    num_rows: tl.tensor,
    h: tl.tensor,
    grad_stride: tl.tensor,
    adds: tl.constexpr,
    piece: tl.constexpr,
    block: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + start)
    previous = tl.load(sorted_rows + start - 1, mask=start > 0, other=-1)
    if (row != previous) & (row >= 0) & (row < num_rows):
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < h
        end = tl.load(starts + row + 1)
        # Whole pieces lie between; without one, the occurrences before and after are all there are.
        first_piece = (start + piece - 1) // piece
        last_piece = end // piece
        before = tl.minimum(first_piece * piece, end)
        after = tl.maximum(last_piece * piece, before)
        total = tl.zeros([block], tl.float32)
        # Twice the same code, not two copies of it, which would take more registers than there are.
        for part in tl.range(0, 2):
            first = tl.where(part == 0, start, after)
            last = tl.where(part == 0, before, end)
            total = _add_occurrences(
                total, first, last, grad, bags, divisors, columns, inside, grad_stride
            )
            for index in tl.range(
                tl.where(part == 0, first_piece, last_piece), last_piece, loop_unroll_factor=4
            ):
                total += tl.load(partial + index * h + columns, mask=inside, other=0.0)
        if divisors is None:
            total = tl.div_rn(total, bag_size)
        places = out + row * h + columns
        if adds:
            total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        tl.store(places, total.to(out.dtype.element_ty), mask=inside)
