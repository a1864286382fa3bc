"""The ablation objectives against their readable twins, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.objectives import (
    multi_label_bce,
    multi_label_hinge,
    summed_probability_loss,
    superposition_loss,
)
from megatron_tst.ops.reference import (
    multi_hot_cross_entropy_reference,
    multi_label_bce_reference,
    multi_label_hinge_reference,
    summed_probability_loss_reference,
)

VOCABULARY = 20
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "mce": multi_hot_cross_entropy_reference,
    "mce-sum": summed_probability_loss_reference,
    "bce": multi_label_bce_reference,
    "hinge": multi_label_hinge_reference,
}
ABLATIONS = ["mce-sum", "bce", "hinge"]

# Computed in float32 from exactly the logits given; gradients are cast once to their dtype.
LOSS_TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-6},
}


def case(dtype: torch.dtype, leading: tuple[int, ...] = (2, 4)) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(*leading, VOCABULARY).mul(3).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (*leading, 4))
    flat = targets.view(-1, 4)
    flat[0, 2] = flat[0, 0]
    flat[1, 1:3] = -100
    flat[2] = -100
    return logits, targets, torch.rand(leading, dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
@pytest.mark.parametrize("objective", list(REFERENCES))
def test_equals_the_reference(objective: Any, dtype: torch.dtype) -> None:
    logits, targets, grad = case(dtype)
    exact_logits = logits.detach().double().requires_grad_()
    loss = superposition_loss(logits, targets, objective)
    exact = REFERENCES[objective](exact_logits, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), exact, **LOSS_TOLERANCE)
    loss.backward(grad)
    exact.backward(grad.double())
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert exact_logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact_logits.grad, **GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("objective", ABLATIONS)
def test_gradcheck(objective: Any) -> None:
    logits, targets, _ = case(torch.float64, leading=(5,))
    assert torch.autograd.gradcheck(lambda z: superposition_loss(z, targets, objective), logits)


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25, 0.125), (0.0, 1.0, 0.0, 2.0)])
def test_summed_probability_with_weights(weights: tuple[float, ...]) -> None:
    logits, targets, _ = case(torch.float64)
    loss = summed_probability_loss(logits, targets, torch.tensor(weights))
    expected = summed_probability_loss_reference(logits, targets, torch.tensor(weights))
    torch.testing.assert_close(loss, expected)
    ours, exact = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, exact)


def test_summed_probability_of_one_target_is_the_cross_entropy() -> None:
    logits, targets, _ = case(torch.float64)
    torch.testing.assert_close(
        summed_probability_loss(logits, targets[..., :1]),
        multi_hot_cross_entropy(logits, targets[..., :1]),
    )


def test_summed_probability_of_improbable_targets_is_finite() -> None:
    logits = torch.tensor([[0.0, -200.0, -300.0]], requires_grad=True)
    loss = summed_probability_loss(logits, torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.item() == pytest.approx(200 + torch.log(torch.tensor(2.0)).item())
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))


def test_hinge_is_torchs_multilabel_margin_loss() -> None:
    logits, _, _ = case(torch.float64, leading=(3,))
    targets = torch.tensor([[1, 5, 7, 2], [0, 19, 3, 8], [4, 6, 9, 10]])
    padded = F.pad(targets, (0, VOCABULARY - 4), value=-1)
    torch.testing.assert_close(
        multi_label_hinge(logits, targets),
        F.multilabel_margin_loss(logits, padded, reduction="none"),
    )


@pytest.mark.parametrize("loss", [multi_label_bce, multi_label_hinge])
def test_set_objectives_count_a_repeated_token_once(loss: Callable[..., Tensor]) -> None:
    logits = torch.randn(1, VOCABULARY)
    once = loss(logits, torch.tensor([[3, 8, -100, -100]]))
    repeated = loss(logits, torch.tensor([[8, 3, 3, 8]]))
    torch.testing.assert_close(once, repeated, rtol=0, atol=0)


@pytest.mark.parametrize("objective", list(REFERENCES))
def test_wholly_ignored_bag_has_no_loss_and_no_gradient(objective: Any) -> None:
    logits = torch.randn(2, VOCABULARY, requires_grad=True)
    loss = superposition_loss(logits, torch.tensor([[1, 2], [-100, -100]]), objective)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss[0] > 0
    assert loss[1] == 0
    assert logits.grad[0].abs().sum() > 0
    assert torch.equal(logits.grad[1], torch.zeros(VOCABULARY))


@pytest.mark.parametrize("objective", list(REFERENCES))
def test_logits_are_not_modified(objective: Any) -> None:
    logits, targets, grad = case(torch.float32)
    before, version = logits.detach().clone(), logits._version
    superposition_loss(logits, targets, objective).backward(grad)
    assert logits._version == version
    assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8))


def test_hinge_saves_no_more_for_a_larger_bag() -> None:
    """Saved [.., v] tensors: the logits with the targets masked, shared by all targets."""
    large = []
    for bag_size in (2, 12):
        logits = torch.randn(4, 512, requires_grad=True)
        storages: dict[int, int] = {}
        alive: list[Tensor] = []

        def record(
            tensor: Tensor, seen: dict[int, int] = storages, keep: list[Tensor] = alive
        ) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            keep.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            multi_label_hinge(logits, torch.randint(0, 512, (4, bag_size)))
        large.append(sum(size for size in storages.values() if size >= 4 * 512))
    assert large[0] == large[1]


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="objective is 'mse'"):
        superposition_loss(torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.int64), "mse")


@pytest.mark.parametrize("objective", ["bce", "hinge"])
def test_weights_are_refused_where_targets_are_a_set(objective: Any) -> None:
    logits, targets, _ = case(torch.float32)
    with pytest.raises(ValueError, match=f"objective '{objective}' got target_weights"):
        superposition_loss(logits, targets, objective, torch.ones(4))
