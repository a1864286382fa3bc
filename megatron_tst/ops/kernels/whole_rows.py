"""Triton kernels of the multi-hot cross-entropy whose programs hold a whole row of the logits.

Where the gradient of the losses is known before the backward, the forward can leave the gradient
of the logits in their place: each logit is read once and written once. The registers of a program
hold the row between the statistics and the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tst.ops.kernels.cross_entropy import (
    _READ_BYTES,
    _require_targets,
    rows_are_aligned,
)
from megatron_tst.ops.kernels.launch import is_interpreted, next_power_of_2, on_device
from megatron_tst.ops.kernels.rows import LOG2_E, less_targets, power_of, targets_of_row

# A thread holds a row's share in 32 of its 64 registers: 8 reads of 16 bytes, 128 kB for 32 warps.
_MAX_DEPTH = 8
_MAX_WARPS = 32
_MAX_REGISTERS = 64
_ROW_BYTES = _MAX_DEPTH * _MAX_WARPS * 32 * _READ_BYTES
# So far from the gradient that was expected, relative to it, a gradient is still the same: what
# another order of the same divisions does to float32. bfloat16 is rounded to 2^-9.
_SAME = tl.constexpr(2.0**-21)
_RESCALE_BLOCK = 4096


def serves(logits: Tensor) -> bool:
    """Whether a program can hold a row: 65536 columns, 32768 of float32, read 16 bytes at once."""
    # The kernel has an instruction of NVIDIA's.
    is_known = torch.version.hip is None and logits.stride(-1) == 1 and rows_are_aligned(logits)
    return is_known and logits.shape[-1] * logits.dtype.itemsize <= _ROW_BYTES


def replace_by_gradient(
    logits: Tensor, columns: Tensor, coefficients: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of rows of the whole vocabulary, whose gradient takes the place of the logits.

    Reads each logit once and writes each gradient once (2 or 4 bytes each), and touches the s
    targets of a row three times. In float32, rounded once, without atomics.

    Args:
        logits: [n, v] as for ``shard_statistics``, if :func:`serves` says so; overwritten by
            ``(softmax(z) - sum_i c_i onehot(column_i)) * scale``.
        columns: [n, s] int64; a column outside of the row makes the target logit NaN.
        coefficients: [n, s] float32, ``w_i / sum w``; 0 for ignored targets.
        scale: [n] float32, the gradient of each row's loss; 0 for rows that do not count.

    Returns:
        As ``shard_statistics``.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    _require_targets(logits, columns, coefficients)
    n, v = logits.shape
    maximum, sums, target_logits = torch.empty(
        3, n, dtype=torch.float32, device=logits.device
    ).unbind()
    if n:
        depth, width, num_warps = row_shape(v, logits.dtype)
        with on_device(logits):
            _replace_kernel[(n,)](
                logits,
                columns.contiguous(),
                coefficients.contiguous(),
                scale.contiguous(),
                maximum,
                sums,
                target_logits,
                columns.shape[1],
                logits.stride(0),
                v=v,
                depth=depth,
                threads=32 * num_warps,
                width=width,
                padded_bag=next_power_of_2(columns.shape[1]),
                compiled=not is_interpreted(),
                num_warps=num_warps,
                maxnreg=_MAX_REGISTERS,
            )
    return maximum, sums, target_logits


def rescale(gradient: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Multiplies rows of a gradient by ``scale / expected``, in place, where that is not 1.

    A row whose scale is the one expected, within 2^-21, costs 8 bytes. Of any other each element
    is read, multiplied in float32, rounded a second time and written. Nothing waits for the GPU.

    Args:
        gradient: [n, v] float32, bfloat16 or float16, of column stride 1.
        expected: [n] float32, the scale that it has; 0 where the gradient is 0.
        scale: [n] float32, the one that it is to have.
    """
    n, v = gradient.shape
    if n:
        with on_device(gradient):
            _rescale_kernel[(n,)](
                gradient, expected, scale, v, gradient.stride(0), block=_RESCALE_BLOCK, num_warps=8
            )


def row_shape(v: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Depth (reads a thread), width (columns that a thread reads at once) and warps."""
    width = _READ_BYTES // dtype.itemsize
    num_warps = min(_MAX_WARPS, next_power_of_2(triton.cdiv(v, _MAX_DEPTH * 32 * width)))
    return triton.cdiv(v, 32 * num_warps * width), width, num_warps


@triton.jit
def _anew(z: tl.tensor, compiled: tl.constexpr) -> tl.tensor:
    """What a thread has read at once, so that the compiler neither knows it nor sees beyond it.

    It would widen what is used twice once, or several reads at a time: float32 takes twice the
    registers. The threads of a warp are together here anyway.
    """
    if compiled:
        return tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff;"
            "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
            "=r,=r,=r,=r,r,r,r,r",
            [z],
            dtype=z.dtype,
            is_pure=False,
            pack=128 // z.dtype.primitive_bitwidth,
        )
    else:
        return z


@triton.jit(do_not_specialize=["s"])
def _replace_kernel(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    scale: tl.tensor,
    maximum: tl.tensor,
    sums: tl.tensor,
    target_logits: tl.tensor,
    s: tl.tensor,
    row_stride: tl.tensor,
    v: tl.constexpr,
    depth: tl.constexpr,
    threads: tl.constexpr,
    width: tl.constexpr,
    padded_bag: tl.constexpr,
    compiled: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n * v may exceed 32 bits
    logits += row * row_stride
    columns += row * s
    coefficients += row * s

    # 1. All of the row is on its way before the first logit is used.
    places = tl.arange(0, threads)[:, None] * width + tl.arange(0, width)[None, :]
    step: tl.constexpr = threads * width
    read = ()
    for k in tl.static_range(depth):
        if (k + 1) * step <= v:
            z = tl.load(logits + k * step + places)
        else:
            inside = places < v - k * step
            z = tl.load(logits + k * step + places, mask=inside, other=float("-inf"))
        read = read + (z,)  # type: ignore[assignment]  # noqa: RUF005

    # 2. The statistics, of a thread first, in the order in which the row arrives.
    thread_max = tl.full([threads], float("-inf"), tl.float32)
    thread_sum = tl.zeros([threads], tl.float32)
    for k in tl.static_range(depth):
        new_max = tl.maximum(thread_max, tl.max(read[k].to(tl.float32), 1))
        power = power_of(new_max)
        thread_sum *= tl.exp2(tl.fma(thread_max, LOG2_E, -power))
        thread_max = new_max
        z = _anew(read[k], compiled).to(tl.float32)
        thread_sum += tl.sum(tl.exp2(tl.fma(z, LOG2_E, -power[:, None])), 1)
    row_max = tl.max(thread_max, 0)
    rescaled = thread_sum * tl.exp2(tl.fma(thread_max, LOG2_E, -power_of(row_max)))
    row_sum = tl.sum(rescaled, 0)
    tl.store(maximum + row, row_max)
    tl.store(sums + row, row_sum)

    # 3. The gradient at the targets.
    share, column, held = targets_of_row(columns, coefficients, v, s, padded_bag)
    z_target = tl.load(logits + column, mask=held, other=float("nan")).to(tl.float32)
    # Where nothing counts the logit may be -inf, and 0 * -inf is not 0.
    tl.store(target_logits + row, tl.sum(tl.where(share != 0.0, share * z_target, 0.0), 0))
    power = (row_max + tl.log(row_sum)) * LOG2_E
    at_target = tl.exp2(tl.fma(z_target, LOG2_E, -power))
    at_target = less_targets(at_target, column, columns, coefficients, s)
    # Of few bits, as a thread has hardly a register to spare while it holds its part of the row.
    place = tl.where(held, column, -1).to(tl.int32)
    # Other threads of this program must not overwrite a target's logit before it is read.
    tl.debug_barrier()

    # 4. The softmax everywhere.
    factor = tl.load(scale + row)
    for k in tl.static_range(depth):
        z = _anew(read[k], compiled).to(tl.float32)
        grad = (tl.exp2(tl.fma(z, LOG2_E, -power)) * factor).to(logits.dtype.element_ty)
        if (k + 1) * step <= v:
            tl.store(logits + k * step + places, grad)
        else:
            tl.store(logits + k * step + places, grad, mask=places < v - k * step)
    # Nor must their softmax land on a target's gradient.
    tl.debug_barrier()

    # 5. The targets again, rounded once.
    grad = (at_target * factor).to(logits.dtype.element_ty)
    tl.store(logits + place, grad, mask=place >= 0)


@triton.jit
def _rescale_kernel(
    gradient: tl.tensor,
    expected: tl.tensor,
    scale: tl.tensor,
    v: tl.tensor,
    row_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    known = tl.load(expected + row)
    wanted = tl.load(scale + row)
    # NaN is not the same as anything.
    is_same = tl.abs(wanted - known) <= tl.abs(known) * _SAME
    if is_same == 0:
        factor = tl.div_rn(wanted, known)
        gradient += row * row_stride
        for start in range(0, v, block):
            places = start + tl.arange(0, block)
            z = tl.load(gradient + places, mask=places < v)
            z = (z.to(tl.float32) * factor).to(gradient.dtype.element_ty)
            tl.store(gradient + places, z, mask=places < v)
