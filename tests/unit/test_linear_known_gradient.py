"""The linear loss whose forward computes the gradients: right for any gradient that comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tst.ops import linear_function
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy as linear_loss
from megatron_tst.ops.linear_cross_entropy import (
    linear_multi_hot_cross_entropy_by_offset as linear_loss_by_offset,
)
from megatron_tst.ops.native import products
from megatron_tst.ops.reference import multi_hot_cross_entropy_reference
from tests.unit.test_linear_cross_entropy import TOLERANCE as SINGLE_TOLERANCE
from tests.unit.test_linear_cross_entropy import (
    WEIGHTS,
    as_tensor,
    assert_near,
    case,
    use_small_blocks,
)

# As for the loss by itself; in bfloat16 more, as some of these gradients are those of a few
# positions, whose logits are rounded to 8 bits: measured 7e-3.
TOLERANCE = {**SINGLE_TOLERANCE, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
NUMBER = 0.37
# What becomes of the losses: 1 number for all, that number under a mask, others.
Total = Callable[[Tensor], Tensor]
MASK = (torch.arange(18) != 2).view(3, 6)  # the bag that does not count
TOTALS: dict[str, Total] = {
    "sum": lambda losses: NUMBER * losses.sum(),
    "sum of a flat copy": lambda losses: (losses.transpose(0, 1).contiguous().view(-1) * 1).sum(),
    "masked": lambda losses: NUMBER * (losses * MASK).sum(),
    "weighted": lambda losses: (losses * torch.arange(18).view(3, 6)).sum(),
    "some": lambda losses: losses[:2].sum(),
    "squared": lambda losses: losses.square().sum(),
    "negative": lambda losses: -losses.mean(),
}
UNIFORM = ("sum", "sum of a flat copy", "masked", "negative")


@pytest.fixture(autouse=True, params=["one block", "several blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several blocks":
        use_small_blocks(monkeypatch)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Has one entry for each backward that computes the logits once more."""
    calls: list[object] = []
    original = linear_function._computed_again

    def counted(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        calls.append(ctx)
        return original(ctx, grad)

    monkeypatch.setattr(linear_function, "_computed_again", counted)
    return calls


def exact_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, total: Total
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of hidden states and weight, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses = multi_hot_cross_entropy_reference(leaves[0] @ leaves[1].t(), targets, weights)
    of_hidden, of_weight = torch.autograd.grad(total(losses), leaves)
    return losses.detach(), of_hidden, of_weight


def with_main_grad(weight: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    """The weight as Megatron's DDP has it."""
    wrapped: Any = weight
    wrapped.main_grad = torch.zeros(weight.shape, dtype=dtype)
    wrapped.grad_added_to_main_grad = False
    return wrapped


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("weights", "bag_size"), [*((each, 4) for each in WEIGHTS), (None, 1)])
@DTYPES
def test_any_gradient(
    again: list[object],
    dtype: torch.dtype,
    weights: tuple[float, ...] | None,
    bag_size: int,
    total: str,
) -> None:
    hidden, weight, targets, _ = case(dtype, bag_size)
    losses = linear_loss(hidden, weight, targets, as_tensor(weights), uniform_gradient=True)
    exact = exact_gradients(hidden, weight, targets, as_tensor(weights), TOTALS[total])
    assert_near(losses, exact[0], TOLERANCE[dtype])
    grads = torch.autograd.grad(TOTALS[total](losses), (hidden, weight), retain_graph=True)
    assert len(again) == (0 if total in UNIFORM else 1)
    for grad, leaf, wanted in zip(grads, (hidden, weight), exact[1:], strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, wanted, TOLERANCE[dtype])
    repeated = torch.autograd.grad(TOTALS[total](losses), (hidden, weight))
    assert all(torch.equal(*pair) for pair in zip(grads, repeated, strict=True))


def test_on_a_gpu_strides_alone_are_looked_at() -> None:
    """A tensor without data has no numbers that anybody could wait for."""
    counts = torch.ones(12, dtype=torch.bool, device="meta")
    number = torch.ones((), device="meta")
    found = linear_function._common_number
    assert found(number.expand(3, 4), counts) is not None
    assert found(number.expand(3, 4).transpose(0, 1), counts) is not None
    assert found(torch.ones(3, 4, device="meta"), counts) is None


def test_without_gradients_there_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = case(torch.float32)
    weight = with_main_grad(weight)
    settings: dict[str, Any] = {
        "accumulate_into_main_grad": True,
        "expected_gradient": torch.tensor(NUMBER),
    }
    wanted = linear_loss(hidden, weight, targets)

    def fail(*_: object) -> None:
        raise AssertionError("a gradient")

    monkeypatch.setattr(linear_function, "into_gradient_", fail)
    with torch.no_grad():
        losses = linear_loss(hidden, weight, targets, **settings)
    assert torch.equal(losses, wanted)
    linear_loss(hidden.detach(), weight.detach(), targets, uniform_gradient=True)
    assert not weight.main_grad.any()


@pytest.mark.parametrize("total", ["sum", "negative", "weighted"])
@pytest.mark.parametrize("known", [None, NUMBER])
@pytest.mark.parametrize(
    ("dtype", "main_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_micro_batches_add_up_in_main_grad(
    again: list[object],
    dtype: torch.dtype,
    main_dtype: torch.dtype,
    known: float | None,
    total: str,
) -> None:
    """By way of the forward where it knows the number, and taken back where that was another."""
    hidden, weight, targets, _ = case(dtype)
    weight = with_main_grad(weight, main_dtype)
    expected = None if known is None else torch.tensor(known)
    wanted, bags = torch.zeros(weight.shape, dtype=torch.float64), targets
    for _ in range(2):
        losses = linear_loss(
            hidden,
            weight,
            bags,
            accumulate_into_main_grad=True,
            uniform_gradient=True,
            expected_gradient=expected,
        )
        (grad,) = torch.autograd.grad(TOTALS[total](losses), hidden, retain_graph=True)
        _, exact_hidden, exact_weight = exact_gradients(hidden, weight, bags, None, TOTALS[total])
        assert_near(grad, exact_hidden, TOLERANCE[dtype])
        wanted += exact_weight
        bags = bags.flip(0)
    adds_in_forward = known is not None and main_dtype == torch.promote_types(dtype, torch.float32)
    is_right = total == "sum" or (total == "negative" and not adds_in_forward)
    assert len(again) == (0 if is_right else 2)
    assert weight.grad_added_to_main_grad
    assert weight.grad is None
    assert_near(weight.main_grad, wanted, TOLERANCE[dtype])


@pytest.mark.skipif(products() is None, reason="needs avx512_bf16 without AMX, and a compiler")
def test_products_are_added_unrounded() -> None:
    hidden, weight, targets, _ = case(torch.bfloat16)
    weight = with_main_grad(weight)
    losses = linear_loss(
        hidden, weight, targets, accumulate_into_main_grad=True, uniform_gradient=True
    )
    losses.sum().backward()
    is_rounded = weight.main_grad == weight.main_grad.bfloat16().float()
    assert is_rounded.double().mean() < 0.1


@pytest.mark.parametrize("has_main_grad", [False, True])
def test_a_weight_that_is_an_embedding_too(has_main_grad: bool) -> None:
    """Its gradients of both uses meet; that of the head is in main_grad, as the host has it."""
    _, weight, targets, _ = case(torch.float32)
    head: Any = weight
    if has_main_grad:
        head = with_main_grad(weight)
        head.zero_out_wgrad = True
    hidden = F.embedding(targets[..., 0].clamp(min=0), weight)
    losses = linear_loss(
        hidden,
        weight,
        targets,
        accumulate_into_main_grad=has_main_grad,
        uniform_gradient=True,
        expected_gradient=torch.tensor(NUMBER),
    )
    TOTALS["sum"](losses).backward()
    leaf = weight.detach().double().requires_grad_()
    embedded = F.embedding(targets[..., 0].clamp(min=0), leaf)
    exact = multi_hot_cross_entropy_reference(embedded @ leaf.t(), targets)
    (wanted,) = torch.autograd.grad(TOTALS["sum"](exact), leaf)
    found = head.grad + head.main_grad if has_main_grad else head.grad
    assert_near(found, wanted, TOLERANCE[torch.float32])


def test_losses_by_offset_are_the_same() -> None:
    hidden, weight, targets, _ = case(torch.float32)
    of_four = linear_loss_by_offset(hidden, weight, targets)
    of_three = linear_loss_by_offset(hidden, weight, targets, uniform_gradient=True)
    assert all(torch.equal(*pair) for pair in zip(of_four, of_three, strict=True))


def test_a_frozen_weight_and_frozen_states() -> None:
    hidden, weight, targets, _ = case(torch.float32)
    _, exact_hidden, exact_weight = exact_gradients(hidden, weight, targets, None, TOTALS["sum"])
    TOTALS["sum"](linear_loss(hidden, weight.detach(), targets, uniform_gradient=True)).backward()
    TOTALS["sum"](linear_loss(hidden.detach(), weight, targets, uniform_gradient=True)).backward()
    assert_near(hidden.grad, exact_hidden, TOLERANCE[torch.float32])
    assert_near(weight.grad, exact_weight, TOLERANCE[torch.float32])
