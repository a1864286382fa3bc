"""The numerics as modules: what they take and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron_tst import (
    BagEmbedding,
    MultiHotCrossEntropyLoss,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
)
from megatron_tst.ops.objectives import superposition_loss

VOCABULARY = 11
WEIGHTS = [4, 2.0, 1, 0]


def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, VOCABULARY, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, VOCABULARY, (2, 5, 4), generator=generator)


def losses(targets: Any, **settings: Any) -> list[torch.Tensor]:
    """Of everything that takes target weights."""
    logits, _ = case()
    eye = torch.eye(VOCABULARY, dtype=torch.float64)
    return [
        multi_hot_cross_entropy(logits, targets, **settings),
        linear_multi_hot_cross_entropy(logits, eye, targets, **settings),
        superposition_loss(logits, targets, "mce-sum", **settings),
    ]


@pytest.mark.parametrize("form", [tuple, np.array, lambda weights: torch.tensor(weights).half()])
def test_weights_may_be_any_sequence(form: Any) -> None:
    _, targets = case()
    expected = losses(targets, target_weights=torch.tensor(WEIGHTS, dtype=torch.float64))
    for found, exact in zip(losses(targets, target_weights=form(WEIGHTS)), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize(
    "weights", [[1, 1, 1, -1], [1, 1, 1, float("nan")], [1, 1, 1, float("inf")], ["a"] * 4, 3]
)
def test_what_is_no_weight_is_refused(weights: Any) -> None:
    logits, targets = case()
    with pytest.raises(ValueError, match=r"target_weights is .*one weight an offset"):
        multi_hot_cross_entropy(logits, targets, weights)
    with pytest.raises(ValueError, match=r"target_weights is .*one weight an offset"):
        MultiHotCrossEntropyLoss(weights)


def test_targets_may_be_any_integers_but_nothing_else() -> None:
    logits, targets = case()
    module = MultiHotCrossEntropyLoss(WEIGHTS)
    assert torch.equal(module(logits, targets.int()), module(logits, targets))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"has dtype {dtype}"):
            module(logits, targets.to(dtype))
        with pytest.raises(ValueError, match=f"target_bags has dtype {dtype}"):
            losses(targets.to(dtype))


def test_a_mean_counts_no_position_without_a_weighted_target() -> None:
    logits, targets = case()
    # The last target has weight 0, and is all that is left of the first bag.
    targets[0, 0, :3], targets[0, 1, 0] = -100, -100
    each = MultiHotCrossEntropyLoss(WEIGHTS, reduction="none")(logits, targets)
    mean = MultiHotCrossEntropyLoss(WEIGHTS)(logits, targets)
    assert each[0, 0] == 0
    torch.testing.assert_close(mean, each.sum() / 9)
    of_all = MultiHotCrossEntropyLoss()(logits, targets)
    unweighted = MultiHotCrossEntropyLoss(reduction="none")(logits, targets)
    torch.testing.assert_close(of_all, unweighted.mean())


@pytest.mark.parametrize("single", [False, True])
def test_an_ignore_index_that_was_not_given_is_named(single: bool) -> None:
    logits, targets = case()
    targets[0, 1, 0] = -100
    module = MultiHotCrossEntropyLoss(ignore_index=-1)
    with pytest.raises(ValueError, match="not the ignore_index, -1: pass ignore_index=-100"):
        module(logits, targets[..., 0] if single else targets)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_over_both_phases(reduction: Any) -> None:
    _, targets = case()
    targets[0, 1], targets[1, 2, :2] = -100, -100
    embedding = BagEmbedding(VOCABULARY, VOCABULARY, ignore_index=-100, dtype=torch.float64)
    loss = MultiHotCrossEntropyLoss(WEIGHTS, reduction=reduction)
    for tokens in (targets, targets[..., 0].clamp(min=0)):
        names, values = zip(*embedding.named_parameters(), strict=True)

        def of_weights(*given: torch.Tensor, tokens: torch.Tensor = tokens) -> torch.Tensor:
            parameters = dict(zip(names, given, strict=True))  # noqa: B023
            hidden = torch.func.functional_call(embedding, parameters, (tokens,))
            return loss(hidden, tokens)

        torch.autograd.gradcheck(of_weights, values)


def test_an_embedding_that_bags_have_no_meaning_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        BagEmbedding.from_embedding(nn.Embedding(4, 2, max_norm=1.0))
