"""The kernels for one CPU core against float64 operators of torch, and where they are not used."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.cpu import fused_attention
from megatron_tst.ops.native import Kernels, describe_kernels, kernels, products
from megatron_tst.ops.native.kernels import SWITCH, _choose, _compiled
from tests.zygote import ROOT

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HIDDEN_SIZES = [1, 5, 64, 100]

# Sums and exponentials in float32: measured 1e-6 of the largest element of a row.
FLOAT32_ERROR = 4e-6
# bf16 rounds once, at the end: half a unit in the last of 8 digits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip(describe_kernels())
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, exact: Tensor, scale: Tensor | float | None = None) -> None:
    """Within float32 arithmetic relative to ``scale``, and one rounding to the dtype of ``found``.

    Args:
        found: from a kernel.
        exact: float64.
        scale: of the terms of which the result is the sum; None: the largest element of a row.
    """
    assert found.shape == exact.shape
    if scale is None:
        scale = exact.abs().amax(-1, keepdim=True)
    allowed = FLOAT32_ERROR * scale + ROUNDING[found.dtype] * exact.abs()
    excess = (found.double() - exact).abs() - allowed
    assert not found.isnan().any()
    assert float(excess.max()) <= 1e-37, float(excess.max())


# Norm.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@DTYPES
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm(
    compiled: Kernels, dtype: torch.dtype, hidden: int, magnitude: float, has_residual: bool
) -> None:
    eps = 1e-5
    x = (draw(3, 7, hidden) * magnitude).to(dtype)
    weight, grad = draw(hidden, dtype=dtype, seed=1), draw(3, 7, hidden, dtype=dtype, seed=2)
    residual = draw(3, 7, hidden, dtype=dtype, seed=3) if has_residual else None
    y, inverse = compiled.rms_norm(x, weight, eps)
    grad_x, grad_weight = compiled.rms_norm_gradient(grad, x, weight, inverse, residual)
    exact_x, exact_weight = (part.double().requires_grad_() for part in (x, weight))
    exact = rms_norm(exact_x, exact_weight, eps)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    exact_inverse = (exact_x.detach().square().mean(-1) + eps).rsqrt()
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, dtype)
    assert_near(y, exact.detach())
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse.double(), exact_inverse.flatten(), rtol=1e-6, atol=0)
    # The gradient of x is a difference, of the gradient and of its part along x.
    scale = (grad.double() * weight.double()).abs().amax(-1, keepdim=True)
    scale = scale * exact_inverse.unsqueeze(-1)
    exact_grad = exact_grads[0]
    if residual is not None:
        exact_grad = exact_grad + residual.double()
        scale = scale + residual.double().abs().amax()
    assert_near(grad_x, exact_grad, scale)
    assert_near(grad_weight, exact_grads[1], grad.double().abs().sum((0, 1)).max())


def test_rms_norm_of_no_rows(compiled: Kernels) -> None:
    y, inverse = compiled.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)
    grad_x, grad_weight = compiled.rms_norm_gradient(y, y, torch.ones(8), inverse, None)
    assert grad_x.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros(8))


# Heads.


def angles(length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines whose halves differ, which those of a model do not."""
    angle = draw(length, size, seed=9) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def split_heads(
    mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, width = mixed.shape
    size = cosine.shape[-1]
    heads = width // (groups * size) - 2
    parts = mixed.view(length, batch, groups, heads + 2, size)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        shape = (length, 1, 1, 1, size)
        return x * cosine.view(shape) + torch.cat((-second, first), -1) * sine.view(shape)

    query = rotate(parts[..., :heads, :]).permute(1, 2, 0, 3, 4)
    key = rotate(parts[..., heads : heads + 1, :]).permute(1, 2, 0, 3, 4)
    value = parts[..., heads + 1, :].permute(1, 2, 0, 3)
    merged = batch * groups
    return (
        query.reshape(merged, length * heads, size),
        key.reshape(merged, length, size),
        value.reshape(merged, length, size),
    )


@DTYPES
@pytest.mark.parametrize("size", [2, 10, 64])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_heads(compiled: Kernels, dtype: torch.dtype, size: int, groups: int, heads: int) -> None:
    length, batch = 5, 2
    mixed = draw(length, batch, groups * (heads + 2) * size, dtype=dtype)
    cosine, sine = angles(length, size, dtype)
    found = compiled.split_heads(mixed, cosine, sine, groups)
    leaf = mixed.double().requires_grad_()
    exact = split_heads(leaf, cosine.double(), sine.double(), groups)
    for part, expected in zip(found, exact, strict=True):
        assert part.is_contiguous()
        assert_near(part, expected.detach())
    grads = [draw(*part.shape, dtype=dtype, seed=5 + i) for i, part in enumerate(found)]
    shape = (length, batch, groups, heads, size)
    joined = compiled.join_head_gradients(grads[0], grads[1], grads[2], cosine, sine, shape)
    (expected,) = torch.autograd.grad(exact, leaf, [grad.double() for grad in grads])
    assert joined.dtype == dtype
    assert_near(joined, expected)


def test_stores_of_bf16_round_to_the_nearest_even(compiled: Kernels) -> None:
    """Products of two numbers of 8 digits have 16, among them many halves."""
    digits = (torch.arange(128) / 128 + 1).bfloat16()
    numbers = torch.cat((digits, -digits))
    cosine = torch.cat((digits, digits)).repeat(256, 1)
    query = numbers.unsqueeze(-1).repeat(1, 1, 256).view(256, 1, 256).contiguous()
    mixed = torch.cat((query, query, query), -1)
    rotated, _, _ = compiled.split_heads(mixed, cosine, torch.zeros_like(cosine), 1)
    products = numbers.float().unsqueeze(-1) * cosine.float()
    assert int((products.view(torch.int32) & 0xFFFF == 0x8000).sum()) > 1000
    assert torch.equal(rotated.view(256, 256), products.bfloat16())


def test_stores_of_bf16_reach_infinity_and_keep_small_numbers(compiled: Kernels) -> None:
    largest = torch.finfo(torch.bfloat16).max
    smallest = 2.0**-133
    numbers = [largest, -largest, smallest, 3 * smallest, 5 * smallest, 0.0]
    mixed = torch.tensor(numbers).repeat_interleave(2).bfloat16().repeat(3).view(1, 1, 36)
    cosine = torch.full((1, 12), 1.0078125).bfloat16()
    cosine[0, 4:] = 0.5
    query, _, _ = compiled.split_heads(mixed, cosine, torch.zeros_like(cosine), 1)
    expected = (mixed[0, 0, :12].float() * cosine[0].float()).bfloat16()
    assert query.flatten()[:4].isinf().all()
    assert torch.equal(query.flatten().view(torch.int16), expected.view(torch.int16))


# Softmax.


def visible(rows: int, keys: int, first: int, heads: int) -> Tensor:
    positions = first + torch.arange(rows) // heads
    return torch.arange(keys) <= positions.unsqueeze(-1)


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("first", "positions"), [(0, 1), (0, 5), (0, 13), (8, 5), (0, 64), (128, 37)]
)
@pytest.mark.parametrize("magnitude", [1.0, 80.0, 1e4])
def test_causal_softmax(
    compiled: Kernels,
    dtype: torch.dtype,
    heads: int,
    first: int,
    positions: int,
    magnitude: float,
) -> None:
    rows, keys, scale = positions * heads, first + positions, 0.3
    scores = (draw(2, rows, keys) * magnitude).to(dtype)
    grad = draw(2, rows, keys, dtype=dtype, seed=1)
    seen = visible(rows, keys, first, heads)
    exact = (scores.double() * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    # What lies behind a position must not be looked at.
    for tensor in (scores, grad):
        tensor.masked_fill_(~seen, torch.nan)
    probabilities = compiled.causal_softmax_(scores, first, heads, scale)
    assert probabilities is scores
    assert not probabilities[:, ~seen].any()
    # The exponent of a score far below the maximum has the error of a float32 of that size, at
    # which the probability is small.
    assert_near(probabilities, exact)
    given = probabilities.double()
    visible_grad = grad.double().masked_fill(~seen, 0)
    along = (given * visible_grad).sum(-1, keepdim=True)
    exact_grad = (visible_grad - along) * given * scale
    found = compiled.causal_softmax_gradient_(probabilities, grad, first, heads, scale)
    assert found is grad
    assert not found[:, ~seen].any()
    assert_near(found, exact_grad, visible_grad.abs().amax() * scale)


@DTYPES
def test_softmax_of_scores_of_minus_infinity(compiled: Kernels, dtype: torch.dtype) -> None:
    scores = torch.tensor([[[1.0, 0.0, 0.0], [-torch.inf, 2.0, 0.0], [0.0, -torch.inf, 0.0]]])
    scores = scores.to(dtype)
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]], dtype=dtype)
    found = compiled.causal_softmax_(scores, 0, 1, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-37)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    length, heads = key.shape[1], query.shape[1] // key.shape[1]
    scores = query @ key.transpose(1, 2) * scale
    seen = visible(length * heads, length, 0, heads)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def attend(
    compiled: Kernels, parts: tuple[Tensor, Tensor, Tensor], grad: Tensor, scale: float
) -> list[Tensor]:
    context, kept = fused_attention.attend(compiled, *parts, scale)
    grads = fused_attention.attention_gradients(compiled, *parts, kept, grad, scale)
    return [context, *grads]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-3))


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 13, 128, 129, 300])
def test_attention_in_blocks(
    compiled: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    heads: int,
    length: int,
) -> None:
    size, scale = 16, 0.25
    query, grad = (draw(4, length * heads, size, dtype=dtype, seed=seed) for seed in (1, 2))
    key, value = (draw(4, length, size, dtype=dtype, seed=seed) for seed in (3, 4))
    found = attend(compiled, (query, key, value), grad, scale)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    exact = attention(leaves[0], leaves[1], leaves[2], scale)
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    # Sums of up to 900 products in float32. In bf16 the scores, the probabilities and the gradients
    # of both are rounded, half a unit in the last place each: 0.2 to 0.6 per cent measured.
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    for part, exact_part in zip(found, expected, strict=True):
        assert part.dtype == dtype
        assert relative_error(part, exact_part) < limit
    # Probabilities that are not kept are computed again.
    monkeypatch.setattr(fused_attention, "_MOST_KEPT", 0)
    assert not fused_attention.attend(compiled, query, key, value, scale)[1]
    again = attend(compiled, (query, key, value), grad, scale)
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


# SwiGLU.


@DTYPES
@pytest.mark.parametrize("width", HIDDEN_SIZES)
@pytest.mark.parametrize("magnitude", [1.0, 30.0, 200.0])
def test_swiglu(compiled: Kernels, dtype: torch.dtype, width: int, magnitude: float) -> None:
    both = draw(3, 5, 2 * width)
    both[..., :width] *= magnitude
    both, grad = both.to(dtype), draw(3, 5, width, dtype=dtype, seed=1)
    leaf = both.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double())
    found = compiled.swiglu(both)
    assert found.is_contiguous()
    # Elementwise, relative to the element. exp(-87) is the smallest exponential.
    gate, up, grad_up = gate.detach().abs(), up.detach().abs(), grad.double().abs()
    sigmoid = gate.neg().sigmoid().where(leaf.detach()[..., :width] < 0, 1) + 2e-38 / FLOAT32_ERROR
    assert_near(found, exact.detach(), sigmoid * gate * up)
    # 1 + gate (1 - sigmoid(gate)) cancels near its zero.
    scale = torch.cat((sigmoid * (1 + gate) * up, sigmoid * gate), -1)
    assert_near(compiled.swiglu_gradient(grad, both), exact_grad, scale * grad_up.repeat(1, 1, 2))


@DTYPES
@pytest.mark.parametrize("size", [*HIDDEN_SIZES, 1000])
def test_add_widened(compiled: Kernels, dtype: torch.dtype, size: int) -> None:
    """To the bits of torch, whose sum of both dtypes is in float32."""
    total, addend = draw(size), draw(size, dtype=dtype, seed=1)
    expected = total + addend
    compiled.add_widened_(total, addend)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("size", [5, 64, 100])
def test_rounding_to_bf16(compiled: Kernels, size: int) -> None:
    """To the nearest, halves to even, by vectors of the CPU and one by one."""
    # Means of two rows: halves between neighbours, and what is no number.
    values = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-6, 1 + 3 * 2**-7, -1.0, torch.nan, torch.inf])
    for one in values:
        for other in values:
            table = torch.stack((one, other)).unsqueeze(-1).repeat(1, size).bfloat16()
            found = compiled.bag_mean(table, torch.tensor([[0, 1]]), None)
            exact = (table.float().sum(0, keepdim=True) / 2).bfloat16()
            torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


# Loss.


def multi_hot_loss(logits: Tensor, columns: Tensor, shares: Tensor) -> Tensor:
    targets = logits.gather(-1, columns)
    return logits.logsumexp(-1) - torch.where(shares != 0, shares * targets, 0).sum(-1)


def bags(rows: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Columns with duplicates, and shares of which some are 0 and each row adds up to 1."""
    generator = torch.Generator().manual_seed(3)
    columns = torch.randint(0, width, (rows, size), generator=generator)
    shares = torch.rand(rows, size, generator=generator)
    if size > 2:
        columns[0] = columns[0, 0]
        columns[1, 1] = columns[1, 0]
        shares[1:3, 1] = 0
    shares /= shares.sum(-1, keepdim=True)
    shares[-1] = 0
    return columns, shares


@DTYPES
@pytest.mark.parametrize("width", [1, 5, 100, 1031])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("magnitude", [1.0, 80.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_multi_hot_loss(
    compiled: Kernels,
    dtype: torch.dtype,
    width: int,
    size: int,
    magnitude: float,
    in_place: bool,
) -> None:
    logits = (draw(6, width).clamp(-1, 1) * magnitude).to(dtype)
    columns, shares = bags(6, width, size)
    scale = draw(6, seed=7)
    leaf = logits.double().requires_grad_()
    exact = multi_hot_loss(leaf, columns, shares.double())
    (exact_grad,) = torch.autograd.grad(exact, leaf, scale.double())
    loss, log_sum_exp = compiled.multi_hot_loss(logits, columns, shares)
    assert loss.dtype == log_sum_exp.dtype == torch.float32
    # A row without targets has its log-sum-exp for a loss, relative to the maximum.
    exact_loss = exact.detach().clone()
    exact_loss[-1] -= leaf.detach()[-1].max()
    # The shares, float32, add up to 1 within a unit in the last place.
    assert_near(loss.unsqueeze(-1), exact_loss.unsqueeze(-1), 1 + leaf.detach().abs().max())
    exact_lse = leaf.detach().logsumexp(-1, keepdim=True)
    assert_near(log_sum_exp.unsqueeze(-1), exact_lse, 1 + exact_lse.abs())
    out = logits if in_place else torch.empty_like(logits)
    before = logits.clone()
    found = compiled.multi_hot_gradient(logits, columns, shares, log_sum_exp, scale, out)
    assert found is out
    assert in_place or torch.equal(logits, before)
    # The log-sum-exp is rounded to float32, which is what its exponential has for a relative error.
    of_row = scale.double().abs().unsqueeze(-1) * (1 + exact_lse.abs() / 16)
    assert_near(found, exact_grad, of_row)


@DTYPES
def test_loss_of_logits_that_differ_by_more_than_an_exponential_holds(
    compiled: Kernels, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[0.0, 200.0, -200.0], [-300.0, -300.0, -1000.0]], dtype=dtype)
    columns, shares = torch.tensor([[0], [1]]), torch.ones(2, 1)
    loss, log_sum_exp = compiled.multi_hot_loss(logits, columns, shares)
    torch.testing.assert_close(loss, torch.tensor([200.0, 0.6931472]))
    out = torch.empty_like(logits)
    compiled.multi_hot_gradient(logits, columns, shares, log_sum_exp, torch.ones(2), out)
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.5, -0.5, 0.0]], dtype=dtype)
    # Half a unit in the last place of -299.3 is 1.5e-5.
    torch.testing.assert_close(out, expected, rtol=3e-5, atol=1e-37)


@DTYPES
def test_targets_without_a_share_may_have_logits_of_minus_infinity(
    compiled: Kernels, dtype: torch.dtype
) -> None:
    logits = draw(2, 9, dtype=dtype)
    logits[:, 3] = -torch.inf
    columns = torch.tensor([[3, 1, 3], [3, 3, 2]])
    shares = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss, log_sum_exp = compiled.multi_hot_loss(logits, columns, shares)
    leaf = logits.double().requires_grad_()
    exact = multi_hot_loss(leaf, columns, shares.double())
    assert_near(loss.unsqueeze(-1), exact.detach().unsqueeze(-1), 1.0)
    out = torch.empty_like(logits)
    compiled.multi_hot_gradient(logits, columns, shares, log_sum_exp, torch.ones(2), out)
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
    assert_near(out, exact_grad)


# NaN.


@DTYPES
@pytest.mark.parametrize("place", [0, 3, 18])
def test_nan_spoils_its_row_alone(compiled: Kernels, dtype: torch.dtype, place: int) -> None:
    def spoiled(*shape: int) -> Tensor:
        tensor = draw(*shape, dtype=dtype)
        tensor[..., 1, place] = torch.nan
        return tensor

    def check(result: Tensor) -> None:
        rows = result.flatten(0, -2) if result.dim() > 1 else result.unsqueeze(-1)
        assert rows[1].isnan().all()
        assert not rows[[0, 2]].isnan().any()

    x, weight = spoiled(3, 19), draw(19, dtype=dtype)
    y, inverse = compiled.rms_norm(x, weight, 1e-5)
    check(y)
    check(compiled.rms_norm_gradient(draw(3, 19, dtype=dtype), x, weight, inverse, None)[0])
    clean, clean_inverse = draw(3, 19, dtype=dtype), torch.ones(3)
    check(compiled.rms_norm_gradient(spoiled(3, 19), clean, weight, clean_inverse, None)[0])
    probabilities = compiled.causal_softmax_(spoiled(1, 3, 21), 18, 1, 0.5)
    assert probabilities[0, 1, :20].isnan().all()
    assert not probabilities[0, [0, 2]].isnan().any()
    columns, shares = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    loss, log_sum_exp = compiled.multi_hot_loss(x, columns, shares)
    check(loss)
    out = torch.empty_like(x)
    check(compiled.multi_hot_gradient(x, columns, shares, log_sum_exp, torch.ones(3), out))
    gate_and_up = draw(3, 38, dtype=dtype)
    gate_and_up[1, place] = torch.nan
    for result in (
        compiled.swiglu(gate_and_up),
        compiled.swiglu_gradient(draw(3, 19, dtype=dtype), gate_and_up)[:, :19],
    ):
        assert result[1, place].isnan()
        assert int(result.isnan().sum()) == 1


def test_dtypes_that_are_served(compiled: Kernels) -> None:
    narrow, wide = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    assert compiled.serves(wide, wide)
    assert compiled.serves(narrow)
    assert not compiled.serves(wide, narrow)
    assert not compiled.serves(wide.double())
    assert not compiled.serves(wide.half())


# Where they come from.


def choose(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[Kernels | None, str]:
    """What a new process under these environment variables would choose."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return _choose.__wrapped__()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, **{SWITCH: "torch"}) == (None, f"torch ({SWITCH}=torch)")
    with pytest.raises(ValueError, match=f"{SWITCH} is 'bogus'.*compiled or torch"):
        choose(monkeypatch, **{SWITCH: "bogus"})


def test_several_threads_keep_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert choose(monkeypatch) == (None, "torch (2 threads a process)")
    finally:
        torch.set_num_threads(threads)


def write_compiler(folder: Path, script: str) -> None:
    program = folder / "c++"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo it is broken >&2; exit 1", "it is broken"),
        # It has a version, and compiles nothing.
        ('[ "$1" = --version ] && exit 0; echo no header >&2; exit 1', "no header"),
        # It claims success.
        ("exit 0", "cannot compile"),
        # What it makes is no library.
        ('[ "$1" = --version ] && exit; for last; do :; done; echo a > "$last"', "cannot compile"),
        # It is no program.
        ("\0", "cannot compile"),
    ],
)
def test_a_broken_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    write_compiler(tmp_path, script)
    found, why = choose(monkeypatch, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert found is None
    assert why.startswith("torch (cannot compile: ")
    assert reason in why
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".so"]
    assert left in ([], [tmp_path / "cache" / "megatron-tst"])


@pytest.mark.usefixtures("compiled")
def test_a_cache_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "file"
    cache.write_text("")
    found, why = choose(monkeypatch, XDG_CACHE_HOME=str(cache))
    assert found is None
    assert "torch (cannot compile: " in why
    assert str(cache) in why


@pytest.fixture(scope="module")
def libraries(compiled: Kernels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compiled for this CPU, and for what torch is told to use of it; in one cache."""
    cache = tmp_path_factory.mktemp("cache")
    found = {}
    for capability in ("", "avx2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            patch.setenv("ATEN_CPU_CAPABILITY", capability)
            chosen, why = _choose.__wrapped__()
            assert chosen is not None, why
            found[capability] = Path(chosen._library._name)
    return found


def test_the_cache_is_used_the_second_time(
    monkeypatch: pytest.MonkeyPatch, libraries: dict[str, Path]
) -> None:
    library = libraries[""]
    before = library.stat().st_mtime_ns
    monkeypatch.setenv("XDG_CACHE_HOME", str(library.parents[1]))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found, why = _choose.__wrapped__()
    assert found is not None
    assert why.startswith("compiled (")
    assert found._library._name == str(library)
    assert library.stat().st_mtime_ns == before
    assert sorted(library.parent.iterdir()) == sorted(set(libraries.values()))


# Products.


@pytest.mark.skipif(products() is None, reason="needs avx512_bf16 without AMX, and a compiler")
@pytest.mark.parametrize(
    ("n", "v", "h"), [(1, 2, 2), (7, 66, 64), (33, 200, 70), (6, 96, 130), (13, 1030, 100)]
)
def test_products(n: int, v: int, h: int) -> None:
    """Odd counts of positions, parts of tiles, several passes over the vocabulary."""
    found = products()
    assert found is not None
    states, weight = draw(n, h, dtype=torch.bfloat16), draw(v, h, dtype=torch.bfloat16, seed=1)
    logits = found.logits_of(states, weight, torch.empty(n, v, dtype=torch.bfloat16))
    terms = states.double().abs() @ weight.double().abs().t()
    assert_near(logits, states.double() @ weight.double().t(), terms)
    of_states, of_weight = torch.ones(n, h), torch.ones(v, h)
    found.add_product_(of_states, logits, weight)
    found.add_transposed_product_(of_weight, logits, states)
    for sums, left, right in (
        (of_states, logits.double(), weight.double()),
        (of_weight, logits.double().t(), states.double()),
    ):
        assert_near(sums, 1 + left @ right, 1 + left.abs() @ right.abs())


@pytest.mark.skipif(products() is None, reason="needs avx512_bf16 without AMX, and a compiler")
def test_products_of_some_shapes_and_dtypes_are_torchs() -> None:
    found = products()
    assert found is not None
    whole = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert found.serves(whole, whole)
    for other in (whole.float(), whole[:, :5].contiguous(), whole.t(), whole[:, :4], whole[:0]):
        assert not found.serves(whole, other)


def test_products_are_torchs_where_they_are_faster_or_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("megatron_tst.ops.native.products")

    for flags in ({"amx_bf16", "avx512_bf16"}, {"bf16"}, set()):
        monkeypatch.setattr(module, "hardware_flags", lambda flags=flags: flags)
        assert products.__wrapped__() is None
    monkeypatch.setattr(module, "hardware_flags", lambda: {"avx512_bf16"})
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert products.__wrapped__() is None


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86 processor")
@DTYPES
def test_fewer_instructions_make_another_library_of_the_same_results(
    compiled: Kernels, libraries: dict[str, Path], dtype: torch.dtype
) -> None:
    assert libraries[""] != libraries["avx2"]
    fewer = Kernels(libraries["avx2"])
    test_rms_norm(fewer, dtype, 100, 1.0, True)
    test_heads(fewer, dtype, 10, 2, 3)
    test_causal_softmax(fewer, dtype, 3, 128, 37, 80.0)
    test_swiglu(fewer, dtype, 100, 30.0)
    test_multi_hot_loss(fewer, dtype, 1031, 4, 80.0, True)
    test_nan_spoils_its_row_alone(fewer, dtype, 3)


@pytest.mark.usefixtures("compiled")
def test_another_source_makes_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library of an older version, in the same cache, is not taken."""
    module = import_module("megatron_tst.ops.native.kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "kernels.cpp"
    monkeypatch.setattr(module, "_SOURCE", source)
    made = set()
    for body in ("int first;", "int second;"):
        source.write_text(body)
        made.add(_compiled("c++"))
    assert len(made) == 2


SCRIPT = """
import torch
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.native import describe_kernels, kernels

logits = torch.randn(2, 9, requires_grad=True)
multi_hot_cross_entropy(logits, torch.zeros(2, 1, dtype=torch.int64)).sum().backward()
print(kernels() is None, describe_kernels())
"""


def test_a_process_without_a_compiler(tmp_path: Path) -> None:
    environment: dict[str, Any] = {
        **{k: v for k, v in os.environ.items() if k != SWITCH},
        "PATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True torch (no compiler: c++, g++, clang++)"
