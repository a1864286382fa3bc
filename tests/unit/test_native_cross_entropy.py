"""The multi-hot cross-entropy by the compiled kernels against the one by torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.ops import native_cross_entropy
from megatron_tst.ops.cross_entropy import (
    function_for,
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_by_offset,
)
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy
from megatron_tst.ops.native import describe_kernels, kernels
from megatron_tst.ops.native_cross_entropy import NativeMultiHotCrossEntropy
from megatron_tst.ops.torch_cross_entropy import TorchMultiHotCrossEntropy

pytestmark = pytest.mark.skipif(kernels() is None, reason=describe_kernels())

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
WEIGHTS = pytest.mark.parametrize(
    "weights", [None, (1.0, 0.5, 0.25, 0.125), (0.0, 3.0, 0.0, 1.0)], ids=str
)
VOCABULARY = 301
IGNORED = -1

# Both are float32 from the same logits, of up to 20: a few units in the last place.
LOSS: dict[str, Any] = {"rtol": 2e-6, "atol": 4e-6}
# bf16 gradients round once in both, to neighbours at the most where float32 differs.
GRADIENT: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-6},
}


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [3, 5, v], targets with repeats, ignored ones and an ignored bag, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, VOCABULARY, generator=generator).mul(4).to(dtype)
    targets = torch.randint(0, VOCABULARY, (3, 5, 4), generator=generator)
    targets[0, 0] = targets[0, 0, 0]
    targets[0, 1, 1:] = IGNORED
    targets[0, 2, 0] = IGNORED
    targets[0, 3] = IGNORED
    targets[0, 4, 2] = targets[0, 4, 1]
    return logits, targets, torch.randn(3, 5, generator=generator)


def weights_of(weights: tuple[float, ...] | None) -> Tensor | None:
    return None if weights is None else torch.tensor(weights)


@DTYPES
@WEIGHTS
def test_equals_the_torch_implementation(
    dtype: torch.dtype, weights: tuple[float, ...] | None
) -> None:
    logits, targets, grad = case(dtype)
    before = logits.clone()

    def run(implementation: Any) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss, by_offset = multi_hot_cross_entropy_by_offset(
            leaf, targets, weights_of(weights), None, IGNORED, False, implementation
        )
        assert not by_offset.requires_grad
        alone = multi_hot_cross_entropy(
            leaf, targets, weights_of(weights), None, IGNORED, False, implementation
        )
        assert torch.equal(alone, loss)
        (grad_logits,) = torch.autograd.grad(loss, leaf, grad)
        return loss.detach(), by_offset, grad_logits

    loss, by_offset, found = run("auto")
    expected_loss, expected_by_offset, expected = run("torch")
    assert loss.dtype == by_offset.dtype == torch.float32
    assert found.dtype == dtype
    torch.testing.assert_close(loss, expected_loss, **LOSS)
    torch.testing.assert_close(by_offset, expected_by_offset, **LOSS)
    torch.testing.assert_close(found, expected, **GRADIENT[dtype])
    assert torch.equal(logits, before)
    # The bags without a target of positive weight, and nothing else.
    first_counts = weights is None or weights[0] > 0
    assert (loss == 0).nonzero().tolist() == ([[0, 3]] if first_counts else [[0, 1], [0, 3]])
    assert not found[loss == 0].any()


@DTYPES
def test_auto_takes_the_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    calls = []
    forward = NativeMultiHotCrossEntropy.forward

    def spy(ctx: Any, *args: Any) -> Any:
        calls.append(args)
        return forward(ctx, *args)

    monkeypatch.setattr(NativeMultiHotCrossEntropy, "forward", staticmethod(spy))
    logits, targets, _ = case(dtype)
    multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED)
    assert len(calls) == 1
    multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED, implementation="torch")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_keep_to_torch(dtype: torch.dtype) -> None:
    logits, targets, _ = case(dtype)
    assert function_for("auto", logits, None) is TorchMultiHotCrossEntropy
    auto = multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED)
    named = multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED, implementation="torch")
    assert torch.equal(auto, named)


def test_several_shards_keep_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 4)
    assert function_for("auto", logits, None) is NativeMultiHotCrossEntropy
    monkeypatch.setattr(native_cross_entropy, "group_size", lambda group: 2)
    assert function_for("auto", logits, None) is TorchMultiHotCrossEntropy


def test_without_kernels_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cross_entropy, "kernels", lambda: None)
    assert function_for("auto", torch.zeros(1, 4), None) is TorchMultiHotCrossEntropy


@DTYPES
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_the_gradient_overwrites_logits_that_may_be_reused(
    dtype: torch.dtype, reuse_logits: bool
) -> None:
    logits, targets, grad = case(dtype)
    before = logits.clone()
    leaf = logits.detach().requires_grad_()
    # As the output of a layer: a gradient that autograd does not keep for a leaf.
    loss = multi_hot_cross_entropy(leaf, targets, ignore_index=IGNORED, reuse_logits=reuse_logits)
    (found,) = torch.autograd.grad(loss, leaf, grad)
    fresh = before.clone().requires_grad_()
    expected_loss = multi_hot_cross_entropy(fresh, targets, ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(expected_loss, fresh, grad)
    assert torch.equal(found, expected)
    assert (found.data_ptr() == logits.data_ptr()) == reuse_logits
    assert torch.equal(logits, expected if reuse_logits else before)


@DTYPES
def test_layouts_of_logits_and_gradients(dtype: torch.dtype) -> None:
    """Logits [b, l, v] that were [l, b, v], and the gradient of a mean, which has one element."""
    logits, targets, _ = case(dtype)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loss = multi_hot_cross_entropy(strided, targets, ignore_index=IGNORED)
    assert torch.equal(loss, multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED))
    (found,) = torch.autograd.grad(loss.mean(), strided)
    leaf = logits.detach().requires_grad_()
    dense = multi_hot_cross_entropy(leaf, targets, ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(dense, leaf, torch.full_like(dense, 1 / dense.numel()))
    torch.testing.assert_close(found, expected, **GRADIENT[dtype])


@DTYPES
@pytest.mark.parametrize("layout", ["transposed", "length first", "sliced", "windows", "expanded"])
def test_layouts_of_targets(dtype: torch.dtype, layout: str) -> None:
    logits, targets, grad = case(dtype)
    wide = torch.cat([targets, targets], -1)
    text = torch.arange(5 + 3)
    layouts = {
        "transposed": targets.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "length first": targets.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": wide[..., :4],
        "windows": text.unfold(0, 4, 1).expand(3, 5, 4),
        "expanded": targets[:, :1].expand(3, 5, 4),
    }
    strided = layouts[layout]
    assert not strided.is_contiguous()
    weight = torch.eye(VOCABULARY, dtype=dtype)
    results = []
    for given in (strided, strided.contiguous()):
        leaf = logits.detach().requires_grad_()
        loss, by_offset = multi_hot_cross_entropy_by_offset(leaf, given, None, None, IGNORED)
        linear = linear_multi_hot_cross_entropy(leaf, weight, given, ignore_index=IGNORED)
        dense = torch.autograd.grad(loss, leaf, grad)[0]
        results.append([loss, by_offset, linear, dense, *torch.autograd.grad(linear, leaf, grad)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_gradients_that_are_views() -> None:
    logits, targets, grad = case(torch.float32)
    expanded, columns = torch.tensor(0.25).expand(3, 5), grad.repeat(1, 2)[:, ::2]
    for strided in (expanded, columns, grad.t().contiguous().t()):
        leaf = logits.detach().requires_grad_()
        loss = multi_hot_cross_entropy(leaf, targets, ignore_index=IGNORED)
        (found,) = torch.autograd.grad(loss, leaf, strided, retain_graph=True)
        (expected,) = torch.autograd.grad(loss, leaf, strided.contiguous())
        assert torch.equal(found, expected)


def test_no_rows() -> None:
    leaf = torch.zeros(0, 4, requires_grad=True)
    loss = multi_hot_cross_entropy(leaf, torch.zeros(0, 2, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert grad.shape == (0, 4)


def test_an_ignored_bag_stops_a_gradient_that_is_not_finite() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    targets = torch.tensor([[1], [IGNORED]])
    loss = multi_hot_cross_entropy(logits, targets, ignore_index=IGNORED)
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, torch.inf]))
    assert grad[0].isfinite().all()
    assert not grad[1].any()
