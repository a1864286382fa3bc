"""Multi-hot cross-entropy on one rank: values, gradients, masks, no mutation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tst.ops import torch_cross_entropy
from megatron_tst.ops.cross_entropy import (
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_by_offset,
    per_target_cross_entropy,
)
from megatron_tst.ops.reference import (
    multi_hot_cross_entropy_reference,
    per_target_cross_entropy_reference,
)

VOCABULARY = 40

# The loss is float32 from exactly the logits given: float32 noise. Gradients are cast once to the
# dtype of the logits: half a unit in its last place.
LOSS_TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-6},
}
WEIGHTS = [None, (1.0, 0.5, 0.25, 0.125), (1.0, 0.0, 0.0, 0.0), (0.0, 3.0, 0.0, 1.0)]


@pytest.fixture(params=["one chunk", "several chunks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the backward: exponentials kept, or recomputed chunk by chunk."""
    if request.param == "several chunks":
        monkeypatch.setattr(torch_cross_entropy, "_CHUNK_ELEMENTS_CPU", 4 * VOCABULARY)


def case(
    dtype: torch.dtype, bag_size: int = 4, leading: tuple[int, ...] = (3, 6)
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets with repeats, ignored ones and wholly ignored bags, and a gradient."""
    torch.manual_seed(0)
    logits = torch.randn(*leading, VOCABULARY).mul(4).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (*leading, bag_size))
    flat = targets.view(-1, bag_size)
    flat[0] = flat[0, 0]
    flat[1, 1:] = -100
    flat[2, 0] = -100
    flat[3] = -100
    grad = torch.rand(leading, dtype=torch.promote_types(dtype, torch.float32))
    return logits, targets, grad


def as_tensor(weights: tuple[float, ...] | None) -> Tensor | None:
    return None if weights is None else torch.tensor(weights)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
def test_equals_the_reference(dtype: torch.dtype, weights: tuple[float, ...] | None) -> None:
    logits, targets, grad = case(dtype)
    exact_logits = logits.detach().double().requires_grad_()
    loss = multi_hot_cross_entropy(logits, targets, as_tensor(weights))
    exact = multi_hot_cross_entropy_reference(exact_logits, targets, as_tensor(weights))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), exact, **LOSS_TOLERANCE)
    loss.backward(grad)
    exact.backward(grad.double())
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert exact_logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact_logits.grad, **GRADIENT_TOLERANCE[dtype])


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
def test_the_gradient_may_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    leaf, targets, grad = case(dtype)
    expected = torch.autograd.grad(multi_hot_cross_entropy(leaf, targets), leaf, grad)[0]
    logits = leaf * 1  # of an operation that does not read its output again
    (actual,) = torch.autograd.grad(
        multi_hot_cross_entropy(logits, targets, reuse_logits=True), logits, grad
    )
    assert torch.equal(actual, expected)
    assert actual.data_ptr() == logits.data_ptr()


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_a_second_backward_pass_is_right_or_refused(reuse_logits: bool) -> None:
    leaf, targets, grad = case(torch.bfloat16)
    loss = multi_hot_cross_entropy(leaf * 1, targets, reuse_logits=reuse_logits)
    (first,) = torch.autograd.grad(loss, leaf, grad, retain_graph=True)
    if reuse_logits:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf, grad)
    else:
        assert torch.equal(torch.autograd.grad(loss, leaf, grad)[0], first)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_losses_by_offset_come_with_the_same_loss(weights: tuple[float, ...] | None) -> None:
    logits, targets, grad = case(torch.float32)
    loss, by_offset = multi_hot_cross_entropy_by_offset(logits, targets, as_tensor(weights))
    exact = per_target_cross_entropy_reference(logits.detach(), targets)
    torch.testing.assert_close(by_offset.double(), exact, **LOSS_TOLERANCE)
    assert not by_offset.requires_grad
    alone = multi_hot_cross_entropy(logits, targets, as_tensor(weights))
    assert torch.equal(loss, alone)
    grads = [torch.autograd.grad(each, logits, grad)[0] for each in (loss, alone)]
    assert torch.equal(*grads)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(weights: tuple[float, ...] | None) -> None:
    logits, targets, _ = case(torch.float64, leading=(5,))
    assert torch.autograd.gradcheck(
        lambda z: multi_hot_cross_entropy(z, targets, as_tensor(weights)), logits
    )


@settings(max_examples=40)
@given(
    bag=st.lists(st.sampled_from([-100, *range(5)]), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_any_bag_has_the_closed_form_gradient(bag: list[int], seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 5, dtype=torch.float64, generator=generator).mul(scale)
    logits.requires_grad_()
    weights = torch.rand(len(bag), dtype=torch.float64, generator=generator)
    loss = multi_hot_cross_entropy(logits, torch.tensor([bag]), weights)
    loss.sum().backward()
    valid = [(token, weight) for token, weight in zip(bag, weights, strict=True) if token >= 0]
    expected = logits.detach().softmax(-1)[0] * bool(valid)
    total = sum(weight for _, weight in valid)
    for token, weight in valid:
        expected[token] -= weight / total
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("weights", [None, (0.0, 0.0, 1.0)])
def test_bag_without_a_counting_target_has_no_loss_and_no_gradient(
    weights: tuple[float, ...] | None,
) -> None:
    logits = torch.randn(2, 8, requires_grad=True)
    # With these weights the second bag keeps only targets of weight 0.
    second = [-100] * 3 if weights is None else [3, 4, -100]
    loss = multi_hot_cross_entropy(logits, torch.tensor([[1, 2, 3], second]), as_tensor(weights))
    loss.sum().backward()
    assert logits.grad is not None
    assert loss[0] > 0
    assert loss[1] == 0
    assert logits.grad[0].abs().sum() > 0
    assert torch.equal(logits.grad[1], torch.zeros(8))


def test_masked_logits_do_not_poison_targets_without_weight() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0]], requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.tensor([[1, 0, -100]]), torch.tensor([1.0, 0, 1]))
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0]], requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.tensor([[0, 0]]))
    loss.backward()
    assert logits.grad is not None
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_modified_and_backward_can_run_twice(dtype: torch.dtype) -> None:
    logits, targets, grad = case(dtype)
    before, version = logits.detach().clone(), logits._version
    loss = multi_hot_cross_entropy(logits, targets)
    first = torch.autograd.grad(loss, logits, grad, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits, grad)[0]
    assert torch.equal(first, second)
    assert logits._version == version
    assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("transposed", [(1, 0, 2), (0, 2, 1)])
def test_logits_need_not_be_contiguous(transposed: tuple[int, ...]) -> None:
    logits, targets, grad = case(torch.float32)
    inverse = torch.tensor(transposed).argsort().tolist()
    strided = logits.detach().permute(transposed).contiguous().permute(inverse).requires_grad_()
    assert not strided.is_contiguous()
    losses = []
    for leaf in (logits, strided):
        losses.append(multi_hot_cross_entropy(leaf, targets))
        losses[-1].backward(grad)
    assert torch.equal(*losses)
    assert logits.grad is not None
    assert strided.grad is not None
    assert torch.equal(logits.grad, strided.grad)


@pytest.mark.parametrize("leading", [(), (5,), (3, 6), (2, 3, 4)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(*leading, 9), torch.randint(0, 9, (*leading, 3))
    loss = multi_hot_cross_entropy(logits, targets)
    assert loss.shape == leading
    expected = multi_hot_cross_entropy_reference(logits.view(-1, 9), targets.view(-1, 3))
    torch.testing.assert_close(loss.double().flatten(), expected, **LOSS_TOLERANCE)


def test_batch_first_and_length_first_agree() -> None:
    logits, targets, _ = case(torch.float32)
    batch_first = multi_hot_cross_entropy(logits, targets)
    length_first = multi_hot_cross_entropy(
        logits.transpose(0, 1).contiguous(), targets.transpose(0, 1).contiguous()
    )
    assert torch.equal(batch_first, length_first.transpose(0, 1))


def test_another_ignore_index() -> None:
    logits, targets, _ = case(torch.float32)
    expected = multi_hot_cross_entropy(logits, targets)
    targets[targets == -100] = -1
    assert torch.equal(multi_hot_cross_entropy(logits, targets, ignore_index=-1), expected)


@pytest.mark.parametrize(("dtype", "saved_per_logit"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_only_the_logits_are_saved_for_backward(
    dtype: torch.dtype, saved_per_logit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_cross_entropy, "_CHUNK_ELEMENTS_CPU", 1024)
    logits = torch.randn(16, 4096).to(dtype).requires_grad_()
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storages[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        multi_hot_cross_entropy(logits, torch.zeros(16, 4, dtype=torch.int64))
    large = [size for size in storages.values() if size > 16 * 100]
    assert logits.data_ptr() in storages
    assert large == [logits.numel() * saved_per_logit]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_target_losses_and_their_mean(dtype: torch.dtype) -> None:
    logits, targets, _ = case(dtype)
    losses = per_target_cross_entropy(logits, targets)
    exact = per_target_cross_entropy_reference(logits.detach(), targets)
    assert losses.shape == targets.shape
    assert not losses.requires_grad
    torch.testing.assert_close(losses.double(), exact, **LOSS_TOLERANCE)
    assert torch.equal(losses[targets == -100], torch.zeros_like(losses[targets == -100]))
    mean = losses.sum(-1) / (targets != -100).sum(-1).clamp(min=1)
    torch.testing.assert_close(mean, multi_hot_cross_entropy(logits, targets), **LOSS_TOLERANCE)


@pytest.mark.parametrize("loss", [multi_hot_cross_entropy, per_target_cross_entropy])
@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_target_outside_the_vocabulary_is_refused(loss: Any, target: int) -> None:
    logits, targets, _ = case(torch.float32)
    targets[1, 1, 1] = target
    with pytest.raises(ValueError, match=rf"target {target} lies outside .* of {VOCABULARY}"):
        loss(logits, targets)


@pytest.mark.parametrize(
    ("targets_shape", "weights_shape", "message"),
    [
        ((3, 5, 4), None, "do not fit logits"),
        ((3, 6), None, "do not fit logits"),
        ((3, 6, 0), None, "do not fit logits"),
        ((3, 6, 4), (3,), "one weight an offset"),
        ((3, 6, 4), (6, 4), "one weight an offset"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    targets_shape: tuple[int, ...], weights_shape: tuple[int, ...] | None, message: str
) -> None:
    weights = None if weights_shape is None else torch.ones(weights_shape)
    targets = torch.zeros(targets_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        multi_hot_cross_entropy(torch.zeros(3, 6, VOCABULARY), targets, weights)
