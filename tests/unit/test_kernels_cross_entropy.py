"""Triton kernels of the multi-hot cross-entropy against the oracle, on each device they run on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.ops.kernels.launch import available
from megatron_tst.ops.reference import multi_hot_cross_entropy_reference
from tests.kernel_devices import Runner

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The loss is float32 from exactly the logits given: float32 noise, of the hardware's exponential
# too. So is the gradient before it is rounded: to half a unit in the last place of its dtype.
LOSS_TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-6},
}


def gradient_tolerance(device: str, dtype: torch.dtype) -> dict[str, Any]:
    tolerance = GRADIENT_TOLERANCE[dtype]
    # Triton's interpreter cuts float32 off to bfloat16 where hardware rounds: a whole unit.
    truncates = device == "cpu" and dtype == torch.bfloat16
    return {**tolerance, "rtol": 2.0**-7} if truncates else tolerance


def case(
    device: str, dtype: torch.dtype, v: int, s: int, n: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a row stride above v, targets with repeats and ignored ones, and a gradient."""
    torch.manual_seed(0)
    # Rows that start at multiples of 16 are read otherwise than those that do not.
    logits = torch.randn(n, v + (3 if v % 16 else 16)).mul(4).to(dtype)[:, :v]
    targets = torch.randint(0, v, (n, s))
    targets[0] = v - 1
    if n > 2:
        targets[1, 1:] = -100
        targets[2] = -100
    return logits.to(device), targets.to(device), torch.rand(n, device=device)


def coefficients(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    shares = (targets != -100).float()
    if weights is not None:
        shares *= weights.to(shares.device)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)


def check_oracle(device: str, dtype: torch.dtype, v: int, s: int, n: int, shards: int) -> None:
    """Loss and gradient, joined over the shards as the tensor-parallel caller does."""
    from megatron_tst.ops.kernels.cross_entropy import (
        shard_gradient,
        shard_statistics,
        statistics_then_gradient,
    )

    logits, targets, grad = case(device, dtype, v, s, n)
    weights = 1 / torch.arange(1, s + 1)
    shares = coefficients(targets, weights)
    parts, start = [], 0
    for part in logits.tensor_split(shards, dim=-1):
        columns = targets - start
        inside = (columns >= 0) & (columns < part.shape[1])
        parts.append((part, columns, shares * inside))
        start += part.shape[1]
    maxima, sums, target_logits = (
        torch.stack(statistics)
        for statistics in zip(*(shard_statistics(*part) for part in parts), strict=True)
    )
    maximum = maxima.amax(0)
    lse = maximum + (sums * (maxima - maximum).exp()).sum(0).log()
    live = shares.sum(-1) > 0
    loss = (lse - target_logits.sum(0)) * live
    exact_logits = logits.double().requires_grad_()
    exact = multi_hot_cross_entropy_reference(exact_logits, targets, weights.to(device))
    torch.testing.assert_close(loss.double(), exact, **LOSS_TOLERANCE)
    exact.backward(grad.double())
    assert exact_logits.grad is not None
    gradient = torch.cat([shard_gradient(*part, lse, grad * live) for part in parts], -1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), exact_logits.grad, **gradient_tolerance(device, dtype)
    )
    if shards == 1:
        own = logits.clone()
        at_once = statistics_then_gradient(own, targets, shares, grad * live)
        for found, wanted in zip(at_once, (lse, target_logits.sum(0)), strict=True):
            torch.testing.assert_close(found, wanted, **LOSS_TOLERANCE)
        # The same operations; the logarithm is another library's.
        torch.testing.assert_close(own, gradient, **gradient_tolerance(device, dtype))


# Smaller than a read, not a multiple of one; more than one block, without and with alignment.
@pytest.mark.parametrize(("v", "s"), [(1, 1), (7, 3), (250, 16), (8200, 6), (8240, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(on_device: Runner, dtype: torch.dtype, v: int, s: int) -> None:
    on_device(check_oracle, dtype, v, s, 5, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_a_vocabulary_equal_the_oracle(on_device: Runner, dtype: torch.dtype) -> None:
    on_device(check_oracle, dtype, 300, 4, 6, 3)


def test_the_largest_vocabulary(on_device: Runner) -> None:
    on_device(check_oracle, torch.bfloat16, 262144, 16, 1, 1)


def check_whole_rows(device: str, dtype: torch.dtype, v: int, s: int, n: int) -> None:
    """Loss and gradient of one pass against the oracle, and the gradient brought to another."""
    from megatron_tst.ops.kernels.whole_rows import replace_by_gradient, rescale, serves

    logits, targets, grad = case(device, dtype, -(-v // 16) * 16, s, n)
    logits, targets = logits[:, :v], targets.clamp(max=v - 1)
    assert serves(logits)
    weights = 1 / torch.arange(1, s + 1)
    shares = coefficients(targets, weights)
    live = shares.sum(-1) > 0
    exact_logits = logits.double().requires_grad_()
    exact = multi_hot_cross_entropy_reference(exact_logits, targets, weights.to(device))
    exact.backward(grad.double())
    assert exact_logits.grad is not None
    # What lies between the rows belongs to others.
    whole = torch.as_strided(logits, (n, logits.stride(0)), (logits.stride(0), 1))
    between = whole[:-1, v:].clone()
    maximum, sums, target_logits = replace_by_gradient(logits, targets, shares, grad * live)
    loss = (maximum + sums.log() - target_logits) * live
    torch.testing.assert_close(loss.double(), exact, **LOSS_TOLERANCE)
    tolerance = gradient_tolerance(device, dtype)
    torch.testing.assert_close(logits.double(), exact_logits.grad, **tolerance)
    assert torch.equal(whole[:-1, v:], between)
    # 1. As expected, or nearly so. 2. Not, in some rows.
    before, wanted = logits.clone(), grad * live
    rescale(logits, wanted, wanted * (1 + 2**-22))
    assert torch.equal(logits, before)
    wanted[-1] *= 3
    rescale(logits, grad * live, wanted)
    assert torch.equal(logits[:-1], before[:-1])
    twice = {**tolerance, "rtol": 2 * tolerance["rtol"]}
    torch.testing.assert_close(logits[-1].double(), 3 * exact_logits.grad[-1], **twice)
    rescale(logits, wanted, wanted * torch.nan)
    assert logits[-1].isnan().all()


# Less than a warp reads; a part of the last read; several warps.
@pytest.mark.parametrize(("v", "s", "n"), [(8, 1, 3), (250, 16, 5), (8200, 6, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_rows_equal_the_oracle(
    on_device: Runner, dtype: torch.dtype, v: int, s: int, n: int
) -> None:
    on_device(check_whole_rows, dtype, v, s, n)


def test_the_largest_row(on_device: Runner) -> None:
    on_device(check_whole_rows, torch.bfloat16, 65536, 6, 2)


def check_served(device: str) -> None:
    from megatron_tst.ops.kernels.whole_rows import serves

    for dtype, columns in ((torch.float32, 32768), (torch.bfloat16, 65536)):
        assert serves(torch.empty(2, columns, dtype=dtype, device=device))
        assert not serves(torch.empty(2, columns + 16, dtype=dtype, device=device))
    assert not serves(torch.empty(2, 250, device=device))  # rows start anywhere
    assert not serves(torch.empty(16, 16, device=device).t()[:, :8])


def test_rows_that_no_program_holds_are_not_served(on_device: Runner) -> None:
    on_device(check_served)


def check_bits(device: str, dtype: torch.dtype) -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    logits, targets, grad = case(device, dtype, 4200, 8)
    before = logits.clone()
    part = (logits, targets, coefficients(targets, torch.rand(8)))
    first, second = shard_statistics(*part), shard_statistics(*part)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lse = first[0] + first[1].log()
    columns, shares = (operand.t().contiguous().t() for operand in part[1:])
    assert not columns.is_contiguous()
    of_strided = shard_statistics(logits, columns, shares)
    assert all(torch.equal(a, b) for a, b in zip(first, of_strided, strict=True))
    gradients = [shard_gradient(*part, lse, grad) for _ in range(2)]
    gradients.append(shard_gradient(logits, columns, shares, lse, grad))
    assert torch.equal(*gradients[1:])
    assert torch.equal(*gradients[:2])
    assert torch.equal(logits, before)
    in_place = shard_gradient(*part, lse, grad, out=logits)
    assert in_place is logits
    assert torch.equal(in_place, gradients[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_repeat_and_do_not_depend_on_where_they_are_written(
    on_device: Runner, dtype: torch.dtype
) -> None:
    on_device(check_bits, dtype)


def check_infinities(device: str) -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    masked = torch.full((10,), -torch.inf)
    some = masked.clone()
    some[3:5] = torch.tensor([1.0, 2.0])
    large = torch.zeros(10)
    large[:2] = torch.tensor([8192.0, -3e38])
    broken = torch.zeros(10)
    broken[7] = torch.nan
    logits = torch.stack([masked, some, large, broken]).to(device)
    columns = torch.tensor([[0, 1], [4, 0], [0, 0], [0, 0]], device=device)
    shares = torch.tensor([[0.0, 0], [1, 0], [0.5, 0.5], [1, 0]], device=device)
    maximum, sums, target_logits = (t.cpu() for t in shard_statistics(logits, columns, shares))
    # A shard without a finite logit adds nothing; one at -inf that has no weight does no harm.
    assert maximum[:3].tolist() == [-torch.inf, 2.0, 8192.0]
    assert sums[0] == 0
    # A multiply-add that rounds once leaves up to half a unit of 8192 log2 e in the exponent.
    torch.testing.assert_close(sums[2].item(), 1.0, rtol=4e-4, atol=0)
    torch.testing.assert_close(sums[1].item(), 1 + torch.e**-1, rtol=1e-6, atol=0)
    assert target_logits.tolist() == [0.0, 2.0, 8192.0, 0.0]
    assert sums[3].isnan()
    lse = torch.tensor([5.0, 2 + sums[1].log(), 8192.0, torch.nan], device=device)
    gradient = shard_gradient(logits, columns, shares, lse, torch.ones(4, device=device)).cpu()
    assert torch.equal(gradient[0], torch.zeros(10))
    assert gradient[1].isfinite().all()
    torch.testing.assert_close(gradient[2], torch.zeros(10), rtol=0, atol=4e-4)
    assert gradient[3].isnan().all()


def test_infinite_and_large_logits(on_device: Runner) -> None:
    on_device(check_infinities)


def check_foreign_columns(device: str) -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    logits = torch.zeros(2, 4, device=device)
    far = 2**40
    columns = torch.tensor([[-far, 1, far], [far, 1, -1]], device=device)
    shares = torch.tensor([[0.0, 1, 0], [0.5, 0.25, 0.25]], device=device)
    statistics = shard_statistics(logits, columns, shares)
    assert statistics[2][0] == 0
    assert statistics[2][1].isnan()
    lse, scale = torch.full((2,), 4.0, device=device).log(), torch.ones(2, device=device)
    gradient = shard_gradient(logits, columns, shares, lse, scale).cpu()
    expected = torch.tensor([[0.25, -0.75, 0.25, 0.25], [0.25, 0.0, 0.25, 0.25]])
    torch.testing.assert_close(gradient, expected)


def test_columns_outside_of_the_shard_are_never_read(on_device: Runner) -> None:
    on_device(check_foreign_columns)


@pytest.mark.gpu
def test_more_logits_than_32_bits_can_count() -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    n, v = 16400, 131072  # 4.3 GB
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-1].normal_()
    columns = torch.full((n, 1), 5, device="cuda")
    shares = torch.ones(n, 1, device="cuda")
    maximum, sums, target_logits = shard_statistics(logits, columns, shares)
    lse = maximum + sums.log()
    last = logits[-1].double()
    torch.testing.assert_close(lse[-1].double(), last.logsumexp(0), **LOSS_TOLERANCE)
    assert target_logits[-1] == last[5]
    expected = last.softmax(0)
    expected[5] -= 1
    gradient = shard_gradient(logits, columns, shares, lse, torch.ones_like(lse), out=logits)
    tolerance = gradient_tolerance("cuda", torch.bfloat16)
    torch.testing.assert_close(gradient[-1].double(), expected, **tolerance)


def check_refusals(device: str) -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    logits, columns, shares = torch.zeros(2, 8), torch.zeros(2, 3).long(), torch.ones(2, 3)
    row = torch.zeros(2)
    with pytest.raises(ValueError, match=r"logits is torch\.float64.*use the torch"):
        shard_statistics(logits.double(), columns, shares)
    with pytest.raises(ValueError, match="column stride of 1"):
        shard_statistics(torch.zeros(8, 2).t(), columns, shares)
    for unfit in (columns[:1], columns[:, :0], columns[:, :2], columns[0]):
        with pytest.raises(ValueError, match="do not fit logits"):
            shard_statistics(logits, unfit, shares)
    with pytest.raises(ValueError, match="do not fit logits"):
        shard_statistics(logits, columns, shares.double())
    with pytest.raises(ValueError, match=r"out \(2, 8\) torch\.bfloat16 does not fit"):
        shard_gradient(logits, columns, shares, row, row, out=logits.bfloat16())
    with pytest.raises(ValueError, match=r"scale \(3,\) do not fit logits \(2, 8\)"):
        shard_gradient(logits, columns, shares, row, torch.zeros(3))
    assert [len(t) for t in shard_statistics(logits[:0], columns[:0], shares[:0])] == [0, 0, 0]


def test_what_does_not_fit_is_refused(on_device: Runner) -> None:
    on_device(check_refusals)


def check_available(device: str) -> None:
    assert available(torch.device(device))
    assert not available(torch.device("meta"))


def test_kernels_know_where_they_run(on_device: Runner) -> None:
    on_device(check_available)
    assert not available(torch.device("cpu"))  # this process does not interpret


def test_triton_is_imported_by_the_kernels_alone() -> None:
    program = (
        "import sys, torch, megatron_tst.ops.cross_entropy, megatron_tst.ops.embedding\n"
        "from megatron_tst.ops.kernels import launch\n"
        "launch.available(torch.device('cpu'))\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
