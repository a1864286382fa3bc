"""What the kernels of the multi-hot cross-entropy do with a row, as functions of a program."""

from __future__ import annotations

import triton
import triton.language as tl

# exp(x) = 2^(x log2 e): the hardware has an instruction for powers of two alone, and the
# multiplication is one with the subtraction before it.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def power_of(maximum: tl.tensor) -> tl.tensor:
    """``maximum * log2(e)``, to be subtracted."""
    power = maximum * LOG2_E
    # Not -inf, from which to subtract -inf would give NaN: the exponentials are 0.
    return tl.where(power == float("-inf"), 0.0, power)


@triton.jit
def _read(
    logits: tl.tensor,
    v: tl.tensor,
    depth: tl.constexpr,
    threads: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """What each thread reads at once, [threads, width * depth]; joined, it stays in its thread."""
    thread = tl.arange(0, threads)[:, None]
    i = tl.arange(0, width)[None, :]
    # Columns that are read one by one lie beside those of the neighbouring threads.
    places = thread * width + i if aligned else i * threads + thread
    step: tl.constexpr = threads * width
    z = _read_once(logits, places, v, masked)
    if depth > 1:
        z = tl.join(z, _read_once(logits, places + step, v, masked))
    if depth > 2:
        third = _read_once(logits, places + 2 * step, v, masked)
        z = tl.join(z, tl.join(third, _read_once(logits, places + 3 * step, v, masked)))
    return tl.reshape(z, [threads, width * depth]).to(tl.float32)


@triton.jit
def _read_once(
    logits: tl.tensor, places: tl.tensor, v: tl.tensor, masked: tl.constexpr
) -> tl.tensor:
    if masked:
        return tl.load(logits + places, mask=places < v, other=float("-inf"))
    else:
        return tl.load(logits + places)


@triton.jit
def _add_exponentials(
    thread_max: tl.tensor, thread_sum: tl.tensor, z: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    new_max = tl.maximum(thread_max, tl.max(z, 1))
    power = power_of(new_max)
    exponentials = tl.exp2(tl.fma(z, LOG2_E, -power[:, None]))
    thread_sum *= tl.exp2(tl.fma(thread_max, LOG2_E, -power))
    return new_max, thread_sum + tl.sum(exponentials, 1)


@triton.jit
def targets_of_row(
    columns: tl.tensor,
    coefficients: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    padded_bag: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Coefficient and column of each target, and whether it counts and lies in this shard."""
    i = tl.arange(0, padded_bag)
    share = tl.load(coefficients + i, mask=i < s, other=0.0)
    column = tl.load(columns + i, mask=i < s, other=0)
    return share, column, (share != 0.0) & (column >= 0) & (column < v)


@triton.jit
def less_targets(
    at_target: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    s: tl.tensor,
) -> tl.tensor:
    """The softmax at each target, less the coefficients of all targets of that column.

    Those of a token that occurs twice go through the same operations: whichever is stored last, no
    matter.
    """
    for j in range(s):
        same = column == tl.load(columns + j)
        at_target -= tl.where(same, tl.load(coefficients + j), 0.0)
    return at_target


@triton.jit
def statistics_of_row(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    depth: tl.constexpr,
    threads: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
    padded_bag: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Maximum, sum of exponentials and weighted target logit."""
    # Each thread keeps a maximum and a sum of its own, so that threads exchange nothing before the
    # end, and rescaling costs one exponential for all that a thread reads at once.
    thread_max = tl.full([threads], float("-inf"), tl.float32)
    thread_sum = tl.zeros([threads], tl.float32)
    block: tl.constexpr = depth * threads * width
    whole = v // block * block
    for start in range(0, whole, block):
        z = _read(logits + start, v, depth, threads, width, aligned, False)
        thread_max, thread_sum = _add_exponentials(thread_max, thread_sum, z)
    if whole < v:
        z = _read(logits + whole, v - whole, depth, threads, width, aligned, True)
        thread_max, thread_sum = _add_exponentials(thread_max, thread_sum, z)
    row_max = tl.max(thread_max, 0)
    rescale = tl.exp2(tl.fma(thread_max, LOG2_E, -power_of(row_max)))
    row_sum = tl.sum(thread_sum * rescale, 0)

    share, column, held = targets_of_row(columns, coefficients, v, s, padded_bag)
    z_target = tl.load(logits + column, mask=held, other=float("nan")).to(tl.float32)
    # Where nothing counts the logit may be -inf, and 0 * -inf is not 0.
    return row_max, row_sum, tl.sum(tl.where(share != 0.0, share * z_target, 0.0), 0)


@triton.jit
def gradient_of_row(
    logits: tl.tensor,
    columns: tl.tensor,
    coefficients: tl.tensor,
    power: tl.tensor,
    factor: tl.tensor,
    out: tl.tensor,
    v: tl.tensor,
    s: tl.tensor,
    block: tl.constexpr,
    padded_bag: tl.constexpr,
) -> None:
    """Writes the gradient; power: of two, of the log-sum-exp."""
    # 1. The gradient at the targets, from their logits, which step 2 may overwrite.
    _, column, held = targets_of_row(columns, coefficients, v, s, padded_bag)
    z_target = tl.load(logits + column, mask=held, other=0.0).to(tl.float32)
    at_target = tl.exp2(tl.fma(z_target, LOG2_E, -power))
    at_target = less_targets(at_target, column, columns, coefficients, s)
    # Other threads of this program must not overwrite a target's logit before it is read.
    tl.debug_barrier()

    # 2. The softmax everywhere.
    places = tl.arange(0, block)
    whole = v // block * block
    for start in range(0, whole, block):
        z = tl.load(logits + start + places).to(tl.float32)
        grad = tl.exp2(tl.fma(z, LOG2_E, -power)) * factor
        tl.store(out + start + places, grad.to(out.dtype.element_ty))
    if whole < v:
        inside = whole + places < v
        z = tl.load(logits + whole + places, mask=inside).to(tl.float32)
        grad = tl.exp2(tl.fma(z, LOG2_E, -power)) * factor
        tl.store(out + whole + places, grad.to(out.dtype.element_ty), mask=inside)
    # Nor must their softmax land on a target's gradient.
    tl.debug_barrier()

    # 3. The targets again, rounded once.
    tl.store(out + column, (at_target * factor).to(out.dtype.element_ty), mask=held)
