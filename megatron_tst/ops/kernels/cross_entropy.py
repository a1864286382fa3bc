"""Triton kernels of the multi-hot cross-entropy over one vocabulary shard.

One program a row walks over the vocabulary in blocks. The s targets are read by their index, so
that the cost hardly grows with s. Nothing is auto-tuned: timing a kernel that writes in place
would run it more than once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tst.ops.kernels.launch import next_power_of_2, on_device, require_rows
from megatron_tst.ops.kernels.rows import LOG2_E, gradient_of_row, statistics_of_row

# A block of the vocabulary is up to 4 reads of 16 bytes for each thread of at most 8 warps.
_READ_BYTES = 16
_MAX_DEPTH = 4
_MAX_WARPS = 8


def shard_statistics(
    logits: Tensor, columns: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard contributes to the loss, in one pass over its logits.

    Reads each logit once (2 or 4 bytes), and 16 bytes a target; writes 12 bytes a row. Local to the
    rank, no collective. The shards are joined by the caller: with ``M = max over shards of m``,
    ``logsumexp = M + log(sum over shards of sums * exp(m - M))``; target logits add up.

    Args:
        logits: [n, v] float32, bfloat16 or float16; any row stride. An exponent is off by up to
            half a unit in the last place of ``m log2 e``, as ``logsumexp`` in fp32 is; beyond 1e9
            that overflows.
        columns: [n, s] int64 column of each target in this shard; not read where the coefficient
            is 0. Another column outside of the shard makes the target logit NaN.
        coefficients: [n, s] float32, ``w_i / sum w``; 0 for ignored targets and other shards'.

    Returns:
        float32, [n] each: the maximum m (-inf where all logits are), ``sum_v exp(z_v - m)`` (0
        there), and ``sum_i c_i z[column_i]``, not relative to the maximum.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    _require_targets(logits, columns, coefficients)
    n, v = logits.shape
    maximum, sums, target_logits = torch.empty(
        3, n, dtype=torch.float32, device=logits.device
    ).unbind()
    if n:
        depth, width, num_warps = block_shape(v, logits.dtype)
        with on_device(logits):
            _statistics_kernel[(n,)](
                logits,
                columns.contiguous(),
                coefficients.contiguous(),
                maximum,
                sums,
                target_logits,
                v,
                columns.shape[1],
                logits.stride(0),
                depth=depth,
                threads=32 * num_warps,
                width=width,
                aligned=rows_are_aligned(logits),
                padded_bag=next_power_of_2(columns.shape[1]),
                num_warps=num_warps,
            )
    return maximum, sums, target_logits


def shard_gradient(
    logits: Tensor,
    columns: Tensor,
    coefficients: Tensor,
    log_sum_exp: Tensor,
    scale: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of one vocabulary shard: ``(exp(z - lse) - sum_i c_i onehot(column_i)) * scale``.

    Reads each logit once and writes each gradient once (2 or 4 bytes each), and touches the s
    targets of a row twice. Computed in float32, rounded once. Deterministic: the coefficients of a
    token that occurs twice are subtracted in the order of the bag, without atomics.

    Args:
        logits: [n, v] as for :func:`shard_statistics`.
        columns: [n, s] as there; a column outside of the shard gets no gradient.
        coefficients: [n, s] as there.
        log_sum_exp: [n] float32, over the whole vocabulary.
        scale: [n] float32, the gradient of each row's loss; 0 for rows that do not count.
        out: where to write, of the logits' shape and dtype; the logits themselves, or memory that
            does not overlap them. ``None`` allocates.

    Returns:
        [n, v] in the logits' dtype, local to the rank; ``out`` if given.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    _require_targets(logits, columns, coefficients)
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    require_rows("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} does not fit logits {tuple(logits.shape)} "
            f"{logits.dtype}: pass a tensor of their shape and dtype."
        )
    n, v = logits.shape
    if log_sum_exp.shape != (n,) or scale.shape != (n,):
        raise ValueError(
            f"log_sum_exp {tuple(log_sum_exp.shape)} and scale {tuple(scale.shape)} do not fit "
            f"logits {tuple(logits.shape)}: pass one number a row, [n]."
        )
    if n:
        depth, width, num_warps = block_shape(v, logits.dtype)
        with on_device(logits):
            _gradient_kernel[(n,)](
                logits,
                columns.contiguous(),
                coefficients.contiguous(),
                log_sum_exp.contiguous(),
                scale.contiguous(),
                out,
                v,
                columns.shape[1],
                logits.stride(0),
                out.stride(0),
                block=depth * 32 * num_warps * width,
                padded_bag=next_power_of_2(columns.shape[1]),
                num_warps=num_warps,
            )
    return out


def statistics_then_gradient(
    logits: Tensor, columns: Tensor, coefficients: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Statistics, and the gradient in the place of the logits, of a whole vocabulary.

    A program reads its row a second time soon after the first, from the second-level cache of the
    GPU as long as all rows in work fit into it: 4 bytes a logit from and to its memory in bfloat16,
    where :func:`shard_statistics` and :func:`shard_gradient` move 6.

    Args:
        logits: [n, v] as for :func:`shard_statistics`; overwritten with what
            :func:`shard_gradient` gives.
        columns: [n, s] as there.
        coefficients: [n, s] as there.
        scale: [n] float32, as for :func:`shard_gradient`.

    Returns:
        float32, [n] each: the log-sum-exp, and ``sum_i c_i z[column_i]``.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    _require_targets(logits, columns, coefficients)
    n, v = logits.shape
    log_sum_exp, target_logits = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    if n:
        depth, width, num_warps = block_shape(v, logits.dtype)
        with on_device(logits):
            _statistics_then_gradient_kernel[(n,)](
                logits,
                columns.contiguous(),
                coefficients.contiguous(),
                scale.contiguous(),
                log_sum_exp,
                target_logits,
                v,
                columns.shape[1],
                logits.stride(0),
                depth=depth,
                threads=32 * num_warps,
                width=width,
                aligned=rows_are_aligned(logits),
                padded_bag=next_power_of_2(columns.shape[1]),
                num_warps=num_warps,
            )
    return log_sum_exp, target_logits


def rows_are_aligned(logits: Tensor) -> bool:
    """Whether Triton, which asks for multiples of 16, reads 16 bytes of a row at once."""
    return logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0


def block_shape(v: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Depth (reads a thread), width (columns that a thread reads at once) and warps.

    No more of each than a row has use for: the registers of a thread hold all that it reads.
    """
    width = _READ_BYTES // dtype.itemsize
    depth = min(_MAX_DEPTH, next_power_of_2(triton.cdiv(v, 32 * width)))
    num_warps = min(_MAX_WARPS, next_power_of_2(triton.cdiv(v, depth * 32 * width)))
    return depth, width, num_warps


def _require_targets(logits: Tensor, columns: Tensor, coefficients: Tensor) -> None:
    require_rows("logits", logits)
    fits = columns.dim() == 2 and columns.shape[0] == logits.shape[0] and columns.shape[1] > 0
    if not fits or coefficients.shape != columns.shape or coefficients.dtype != torch.float32:
        raise ValueError(
            f"columns {tuple(columns.shape)} and coefficients {tuple(coefficients.shape)} "
            f"{coefficients.dtype} do not fit logits {tuple(logits.shape)}: pass [n, s] and "
            "float32 [n, s], s >= 1, for logits [n, v]."
        )


@triton.jit(do_not_specialize=["s"])
def _statistics_kernel(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    maximum: tl.tensor,
    sums: tl.tensor,
    target_logits: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    row_stride: tl.tensor,
    depth: tl.constexpr,
    threads: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
    padded_bag: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n * v may exceed 32 bits
    row_max, row_sum, target_logit = statistics_of_row(
        logits + row * row_stride,
        columns + row * s,
        coefficients + row * s,
        v,
        s,
        depth,
        threads,
        width,
        aligned,
        padded_bag,
    )
    tl.store(maximum + row, row_max)
    tl.store(sums + row, row_sum)
    tl.store(target_logits + row, target_logit)


@triton.jit(do_not_specialize=["s"])
def _gradient_kernel(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    log_sum_exp: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    row_stride: tl.tensor,
    out_stride: tl.tensor,
    block: tl.constexpr,
    padded_bag: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n * v may exceed 32 bits
    logits += row * row_stride
    out += row * out_stride
    power = tl.load(log_sum_exp + row) * LOG2_E
    factor = tl.load(scale + row)
    columns += row * s
    coefficients += row * s
    gradient_of_row(logits, columns, coefficients, power, factor, out, v, s, block, padded_bag)


@triton.jit(do_not_specialize=["s"])
def _statistics_then_gradient_kernel(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    scale: tl.tensor,
    log_sum_exp: tl.tensor,
    target_logits: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    row_stride: tl.tensor,
    depth: tl.constexpr,
    threads: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
    padded_bag: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n * v may exceed 32 bits
    logits += row * row_stride
    columns += row * s
    coefficients += row * s
    row_max, row_sum, target_logit = statistics_of_row(
        logits, columns, coefficients, v, s, depth, threads, width, aligned, padded_bag
    )
    total = row_max + tl.log(row_sum)
    tl.store(log_sum_exp + row, total)
    tl.store(target_logits + row, target_logit)
    # The logits of this row, which other threads may still read, are about to be overwritten.
    tl.debug_barrier()
    factor = tl.load(scale + row)
    block: tl.constexpr = depth * threads * width
    gradient_of_row(
        logits, columns, coefficients, total * LOG2_E, factor, logits, v, s, block, padded_bag
    )
