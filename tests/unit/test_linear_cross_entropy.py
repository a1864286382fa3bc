"""Output layer and loss in one, on one rank: values, gradients, memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.ops import logit_blocks, torch_cross_entropy
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy, per_target_cross_entropy
from megatron_tst.ops.linear_cross_entropy import (
    linear_multi_hot_cross_entropy,
    linear_multi_hot_cross_entropy_by_offset,
)
from megatron_tst.ops.native import products
from megatron_tst.ops.reference import multi_hot_cross_entropy_reference

HIDDEN, VOCABULARY = 24, 1100  # the blocks, multiples of 256 rows, do not divide it
WEIGHTS = [None, (1.0, 0.5, 0.25, 0.125), (0.0, 3.0, 0.0, 1.0)]

# Relative to the norm of the exact tensor. float32: the order of sums. bfloat16: logits, their
# gradient and the products of blocks are rounded to 8 bits; measured 3e-3, and 3e-3 for the dense
# path, whose logits and gradients are rounded as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3}


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits at a time, or the least blocks."""
    if request.param == "several blocks":
        use_small_blocks(monkeypatch)


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 positions, or of 256 rows of the vocabulary in chunks of a few positions."""
    monkeypatch.setattr(logit_blocks, "_BLOCK_ELEMENTS_CPU", 1)
    monkeypatch.setattr(logit_blocks, "_LEAST_POSITIONS", 4)
    monkeypatch.setattr(torch_cross_entropy, "_CHUNK_ELEMENTS_CPU", 4 * 256)


def case(
    dtype: torch.dtype, bag_size: int = 4, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets with repeats and ignored ones, and a gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN).div(2).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (3, 6, bag_size))
    flat = targets.view(-1, bag_size)
    flat[0] = flat[0, 0]
    flat[1, 1:] = -100
    flat[2] = -100
    grad = torch.rand(3, 6, dtype=torch.promote_types(dtype, torch.float32))
    return hidden, weight, targets, grad


def as_tensor(weights: tuple[float, ...] | None) -> Tensor | None:
    return None if weights is None else torch.tensor(weights)


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None
    assert expected is not None
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_reference(dtype: torch.dtype, weights: tuple[float, ...] | None) -> None:
    hidden, weight, targets, grad = case(dtype)
    loss = linear_multi_hot_cross_entropy(hidden, weight, targets, as_tensor(weights))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = multi_hot_cross_entropy_reference(
        exact_hidden @ exact_weight.t(), targets, as_tensor(weights)
    )
    assert loss.dtype == grad.dtype
    assert_near(loss, exact, TOLERANCE[dtype])
    loss.backward(grad)
    exact.backward(grad.double())
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert_near(hidden.grad, exact_hidden.grad, TOLERANCE[dtype])
    assert_near(weight.grad, exact_weight.grad, TOLERANCE[dtype])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_losses_by_offset_are_those_of_whole_logits(weights: tuple[float, ...] | None) -> None:
    hidden, weight, targets, grad = case(torch.float32)
    expected = per_target_cross_entropy(hidden @ weight.t(), targets)
    loss, by_offset = linear_multi_hot_cross_entropy_by_offset(
        hidden, weight, targets, as_tensor(weights)
    )
    torch.testing.assert_close(by_offset, expected)
    assert not by_offset.requires_grad
    alone = linear_multi_hot_cross_entropy(hidden, weight, targets, as_tensor(weights))
    assert torch.equal(loss, alone)
    grads = [torch.autograd.grad(each, (hidden, weight), grad) for each in (loss, alone)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.usefixtures("blocks")
def test_gradcheck() -> None:
    hidden, weight, targets, _ = case(torch.float64, vocabulary=300)
    weights = as_tensor(WEIGHTS[1])
    assert torch.autograd.gradcheck(
        lambda x, w: linear_multi_hot_cross_entropy(x, w, targets, weights),
        (hidden, weight),
        fast_mode=True,
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("bag_size", [1, 4])
def test_bfloat16_is_as_close_to_the_exact_gradients_as_the_dense_path(bag_size: int) -> None:
    hidden, weight, targets, grad = case(torch.bfloat16, bag_size)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    multi_hot_cross_entropy_reference(exact_hidden @ exact_weight.t(), targets).backward(
        grad.double()
    )
    errors = []
    for is_linear in (True, False):
        hidden.grad = weight.grad = None
        if is_linear:
            loss = linear_multi_hot_cross_entropy(hidden, weight, targets)
        else:
            loss = multi_hot_cross_entropy(hidden @ weight.t(), targets)
        loss.backward(grad)
        for leaf, exact in ((hidden, exact_hidden), (weight, exact_weight)):
            assert leaf.grad is not None
            assert exact.grad is not None
            errors.append(float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()))
    hidden_error, weight_error, dense_hidden_error, dense_weight_error = errors
    # Where products of blocks are rounded before they are added up, measured 1.32 times at most,
    # with five blocks of 256 rows.
    assert hidden_error < 1.5 * dense_hidden_error
    assert weight_error < 1.01 * dense_weight_error


def test_a_large_vocabulary() -> None:
    hidden, weight, targets, grad = case(torch.float32, vocabulary=262_144)
    loss = linear_multi_hot_cross_entropy(hidden, weight, targets)
    loss.backward(grad)
    linear_grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    dense = multi_hot_cross_entropy(hidden @ weight.t(), targets)
    dense.backward(grad)
    torch.testing.assert_close(loss, dense)
    for actual, expected in zip(linear_grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_can_go_into_its_main_grad(main_dtype: torch.dtype) -> None:
    hidden, weight, targets, grad = case(torch.bfloat16)
    linear_multi_hot_cross_entropy(hidden, weight, targets).backward(grad)
    assert weight.grad is not None
    expected, expected_hidden = weight.grad.to(main_dtype), hidden.grad
    hidden.grad = weight.grad = None
    already: Any = weight
    already.main_grad = torch.ones(weight.shape, dtype=main_dtype)
    already.grad_added_to_main_grad = False
    loss = linear_multi_hot_cross_entropy(hidden, weight, targets, accumulate_into_main_grad=True)
    loss.backward(grad)
    assert already.grad_added_to_main_grad
    # A gradient is rounded once: where it is added, or not at all in float32.
    spacing = torch.finfo(main_dtype if main_dtype == torch.bfloat16 else torch.bfloat16).eps
    torch.testing.assert_close(already.main_grad, expected + 1, rtol=spacing, atol=spacing)
    assert expected_hidden is not None
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, expected_hidden)


@pytest.mark.usefixtures("blocks")
@pytest.mark.skipif(products() is None, reason="needs avx512_bf16 without AMX, and a compiler")
def test_a_main_grad_in_float32_gets_products_in_float32() -> None:
    hidden, weight, targets, grad = case(torch.bfloat16)
    linear_multi_hot_cross_entropy(hidden, weight, targets).backward(grad)
    assert weight.grad is not None
    rounded = weight.grad.float()
    already: Any = weight
    already.main_grad = torch.zeros(weight.shape)
    for _ in range(2):
        loss = linear_multi_hot_cross_entropy(
            hidden, weight, targets, accumulate_into_main_grad=True
        )
        loss.backward(grad)
    once = already.main_grad / 2
    torch.testing.assert_close(once, rounded, rtol=2**-8, atol=1e-7)
    assert (once != once.bfloat16().float()).double().mean() > 0.5


def test_a_weight_without_main_grad_gets_its_gradient() -> None:
    """A model that no DDP wraps."""
    hidden, weight, targets, grad = case(torch.float32)
    (expected,) = torch.autograd.grad(
        linear_multi_hot_cross_entropy(hidden, weight, targets), weight, grad
    )
    loss = linear_multi_hot_cross_entropy(hidden, weight, targets, accumulate_into_main_grad=True)
    loss.backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


def test_hidden_states_and_weight_stay_as_they_were() -> None:
    hidden, weight, targets, grad = case(torch.float32)
    before = hidden.detach().clone(), weight.detach().clone()
    linear_multi_hot_cross_entropy(hidden, weight, targets).backward(grad)
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def test_the_same_bits_each_time() -> None:
    hidden, weight, targets, grad = case(torch.bfloat16)
    results = [
        torch.autograd.grad(
            linear_multi_hot_cross_entropy(hidden, weight, targets), (hidden, weight), grad
        )
        for _ in range(3)
    ]
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets, _ = case(torch.float32)
    with pytest.raises(ValueError, match=r"hidden .* does not fit weight .*one dtype"):
        linear_multi_hot_cross_entropy(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match=r"hidden .* does not fit weight"):
        linear_multi_hot_cross_entropy(hidden[..., 1:], weight, targets)
    with pytest.raises(ValueError, match=r"hidden .* does not fit target_bags"):
        linear_multi_hot_cross_entropy(hidden[1:], weight, targets)
    targets[0, 0, 0] = VOCABULARY
    with pytest.raises(ValueError, match=rf"target {VOCABULARY} lies outside .* {VOCABULARY}"):
        linear_multi_hot_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32])
def test_autocast_casts_as_it_does_for_a_linear_layer(states: torch.dtype) -> None:
    hidden, weight, targets, grad = case(torch.float32)
    hidden = hidden.detach().to(states).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_multi_hot_cross_entropy(hidden, weight, targets)
        logits = torch.nn.functional.linear(hidden, weight)
        dense = multi_hot_cross_entropy(logits, targets)
    assert logits.dtype == torch.bfloat16
    # Both from the same bf16 logits, in float32.
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)
    for of_linear, of_dense in zip(
        torch.autograd.grad(loss, (hidden, weight), grad),
        torch.autograd.grad(dense, (hidden, weight), grad),
        strict=True,
    ):
        assert of_linear.dtype == of_dense.dtype
        # The products of bf16 gradients are rounded in other places.
        torch.testing.assert_close(of_linear, of_dense, rtol=2.0**-5, atol=2.0**-6)


def test_autocast_leaves_no_main_grad_to_add_to() -> None:
    hidden, weight, targets, _ = case(torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="accumulate_into_main_grad is True"),
    ):
        linear_multi_hot_cross_entropy(hidden, weight, targets, accumulate_into_main_grad=True)
