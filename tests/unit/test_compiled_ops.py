"""The numerics under ``torch.compile(fullgraph=True)`` against the same without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_tst import (
    BagEmbedding,
    MultiHotCrossEntropyLoss,
    bag_embedding,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
)
from megatron_tst.ops import compiled
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy_by_offset
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy_by_offset
from megatron_tst.ops.native import describe_kernels, kernels
from megatron_tst.ops.objectives import superposition_loss

VOCABULARY, HIDDEN, BAG = 40, 16, 4
WEIGHTS = [1.0, 0.5, 0.25, 0.0]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=["kernels", "torch"])
def cpu_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels for one CPU core, and with torch's operators."""
    if request.param == "kernels":
        if kernels() is None:
            pytest.skip(describe_kernels())
        return
    for module in ("native_embedding", "native_cross_entropy"):
        monkeypatch.setattr(f"megatron_tst.ops.{module}.kernels", lambda: None)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, hidden states, and bags with gaps, one without any token."""
    torch.manual_seed(0)
    bags = torch.randint(0, VOCABULARY, (2, 6, BAG))
    bags[0, 1, 2:], bags[1, 3] = -100, -100
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    return weight, torch.randn(2, 6, HIDDEN).to(dtype).requires_grad_(), bags


def assert_equal_when_compiled(function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """Value and gradients, bit for bit: the operators do what is done without a compiler."""
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    sources = [tensor for tensor in arguments if tensor.requires_grad]
    results = []
    for call in (function, whole):
        value = call(*arguments)
        up = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
        results.append((value.detach(), *torch.autograd.grad(value, sources, up)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@DTYPES
@pytest.mark.usefixtures("cpu_code")
def test_the_embedding(dtype: torch.dtype) -> None:
    weight, _, bags = operands(dtype)
    assert_equal_when_compiled(lambda w: bag_embedding(w, bags, ignore_index=-100), weight)
    assert_equal_when_compiled(lambda w: bag_embedding(w, bags.clamp(min=0)), weight)


@DTYPES
@pytest.mark.usefixtures("cpu_code")
def test_the_losses(dtype: torch.dtype) -> None:
    weight, hidden, bags = operands(dtype)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda z: multi_hot_cross_entropy(z, bags, WEIGHTS),
        lambda z: multi_hot_cross_entropy(
            z.transpose(0, 1) * 2, bags.transpose(0, 1), reuse_logits=True
        ),
    ]
    for call in calls:
        assert_equal_when_compiled(call, logits)


@DTYPES
def test_the_linear_loss(dtype: torch.dtype) -> None:
    weight, hidden, bags = operands(dtype)
    assert_equal_when_compiled(
        lambda h, w: linear_multi_hot_cross_entropy(h, w, bags, WEIGHTS), hidden, weight
    )


def test_losses_by_offset() -> None:
    weight, hidden, bags = operands(torch.float32)
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (multi_hot_cross_entropy_by_offset, (hidden @ weight.t(),)),
        (linear_multi_hot_cross_entropy_by_offset, (hidden, weight)),
    ]
    for function, arguments in calls:
        whole = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = function(*arguments, bags)
        for given in (bags, bags.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
            found = whole(*arguments, given)
            torch.testing.assert_close(found, expected)
            torch.autograd.grad(found[0].sum(), arguments[-1], retain_graph=True)


@pytest.mark.parametrize("objective", ["mce-sum", "bce", "hinge"])
def test_the_other_objectives(objective: str) -> None:
    weight, hidden, bags = operands(torch.float32)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert_equal_when_compiled(lambda z: superposition_loss(z, bags, objective), logits)


class Model(nn.Module):
    """An embedding, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = BagEmbedding(VOCABULARY, HIDDEN, ignore_index=-100)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.loss = MultiHotCrossEntropyLoss(WEIGHTS)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(tokens))
        return self.loss(self.head(hidden), targets)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),
        # Inductor's code for a CPU takes minutes to build, and runs the operators alike.
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_modules_over_the_switch(device: str, backend: str) -> None:
    """The shapes of a phase are compiled when it begins."""
    torch.manual_seed(0)
    model, (_, _, bags) = Model().to(device), operands(torch.float32)
    whole = torch.compile(model, fullgraph=True, backend=backend)
    bags = bags.to(device)
    for tokens in (bags, bags.clamp(min=0)[..., 0]):
        results = []
        for call in (model, whole):
            loss = call(tokens, tokens)
            results.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused_when_the_operators_run(token: int) -> None:
    weight, hidden, bags = operands(torch.float32)
    bags = bags.clamp(min=0)
    bags[0, 0, 0] = token
    calls: list[tuple[Any, ...]] = [
        (bag_embedding, weight, bags),
        (multi_hot_cross_entropy, hidden @ weight.t(), bags),
        (linear_multi_hot_cross_entropy, hidden, weight, bags),
    ]
    for function, *arguments in calls[:1] if token < 0 else calls:
        whole = torch.compile(function, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match=rf"{token}\b"):
            whole(*arguments)


def test_the_operators_keep_the_rules_of_torch() -> None:
    """Schema, aliasing, shapes without values, and gradients while tracing."""
    weight, hidden, bags = operands(torch.float32)
    logits, targets = (hidden @ weight.t()).detach(), bags.flatten(0, 1)
    logits = logits.flatten(0, 1).requires_grad_()
    torch.library.opcheck(compiled.bag_mean, (weight, bags, [VOCABULARY, 1, 0], -100, "auto"))
    for implementation in ("auto", "torch"):
        settings = (None, None, -100, implementation, True)
        torch.library.opcheck(compiled.multi_hot_loss, (logits, targets, *settings))
    of_linear = (None, None, False, -100, "torch", True)
    torch.library.opcheck(compiled.linear_multi_hot_loss, (hidden, weight, bags, *of_linear))
