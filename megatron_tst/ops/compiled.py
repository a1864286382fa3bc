"""The numerics as operators that ``torch.compile`` calls as they are, each with its gradient.

What they compute, and check, is what the functions of the same purpose do without a compiler.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from megatron_tst.ops import cross_entropy, embedding
from megatron_tst.ops.collectives import group_of, group_size
from megatron_tst.ops.kernels.launch import Implementation
from megatron_tst.ops.linear_function import Layout, LinearMultiHotCrossEntropy
from megatron_tst.ops.logit_blocks import kernels_for
from megatron_tst.ops.targets import validate_target_values
from megatron_tst.ops.torch_cross_entropy import TorchMultiHotCrossEntropy

Losses = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Losses [n]; those of each target [n, s], or [0]; and what the gradient needs beside the operands:
columns [n, s], shares [n, s], which positions count [n], statistics [k, n]."""


class _Context:
    """What an autograd function keeps, outside autograd."""

    def __init__(self, *saved: Tensor | None, **attributes: Any) -> None:
        self.saved_tensors = saved
        self.__dict__.update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


@torch.library.custom_op("megatron_tst::bag_mean", mutates_args=())
def bag_mean(
    weight: Tensor,
    token_bags: Tensor,
    shard: list[int],
    ignore_index: int | None,
    implementation: str,
) -> Tensor:
    """This rank's part of ``bag_embedding``: [v, h], [b, l, s] -> [b, l, h]."""
    rows, ranks, first = shard
    places = embedding.Shard(rows, ranks, first, ignore_index).places_of(token_bags)
    chosen = cast(Implementation, implementation)
    function = embedding.function_for(chosen, weight, token_bags, places[2])
    return cast(Any, function).forward(_Context(), weight, *places)


@bag_mean.register_fake
def _(weight: Tensor, token_bags: Tensor, *settings: Any) -> Tensor:
    return weight.new_empty(*token_bags.shape[:-1], weight.shape[1])


@torch.library.custom_op("megatron_tst::bag_mean_gradient", mutates_args=())
def bag_mean_gradient(
    grad: Tensor,
    token_bags: Tensor,
    shard: list[int],
    ignore_index: int | None,
    implementation: str,
) -> Tensor:
    """Gradient of the weight of ``bag_mean``: [b, l, h], [b, l, s] -> [v, h]."""
    rows, ranks, first = shard
    places = embedding.Shard(rows, ranks, first, ignore_index).places_of(token_bags)
    chosen = cast(Implementation, implementation)
    function = embedding.function_for(chosen, grad, token_bags, places[2])
    return cast(Any, function).backward(_Context(*places, shard_size=rows), grad)[0]


@bag_mean_gradient.register_fake
def _(grad: Tensor, token_bags: Tensor, shard: list[int], *settings: Any) -> Tensor:
    return grad.new_empty(shard[0], grad.shape[-1])


def _keep_bags(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, token_bags, *ctx.settings = inputs
    ctx.save_for_backward(token_bags)


def _differentiate_bag_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return bag_mean_gradient(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


bag_mean.register_autograd(_differentiate_bag_mean, setup_context=_keep_bags)


@torch.library.custom_op("megatron_tst::multi_hot_loss", mutates_args=())
def multi_hot_loss(
    logits: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    group: str | None,
    ignore_index: int,
    implementation: str,
    by_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``multi_hot_cross_entropy`` of [n, v], [n, s]."""
    ranks = group_of(group)
    validate_target_values(targets, logits.shape[-1] * group_size(ranks), ignore_index)
    ctx = _Context()
    function = _loss_function(implementation, logits, group)
    losses = function.forward(
        ctx, logits, targets, target_weights, ranks, ignore_index, False, by_offset
    )
    _, columns, shares, live, *statistics = ctx.saved_tensors
    if function is TorchMultiHotCrossEntropy:
        statistics.pop()
    return _outputs(*losses, columns, shares, live, torch.stack(cast(Any, statistics)))


@multi_hot_loss.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    group: str | None,
    ignore_index: int,
    implementation: str,
    by_offset: bool,
) -> Losses:
    function = _loss_function(implementation, logits, group)
    count = 2 if function is TorchMultiHotCrossEntropy else 1
    return _fake_outputs(logits, targets, by_offset, count)


@torch.library.custom_op("megatron_tst::multi_hot_gradient", mutates_args=())
def multi_hot_gradient(
    grad: Tensor,
    logits: Tensor,
    columns: Tensor,
    shares: Tensor,
    live: Tensor,
    statistics: Tensor,
    group: str | None,
    implementation: str,
) -> Tensor:
    """Gradient of the logits of ``multi_hot_loss``, [n, v]."""
    function = _loss_function(implementation, logits, group)
    kept = [*statistics.unbind()]
    if function is TorchMultiHotCrossEntropy:
        kept.append(cast(Any, None))
    ctx = _Context(logits.contiguous(), columns, shares, live, *kept, reuse_logits=False)
    return cast(Tensor, function.backward(ctx, grad, None)[0])


@multi_hot_gradient.register_fake
def _(grad: Tensor, logits: Tensor, *kept: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    logits, _, _, group, _, implementation, _ = inputs
    ctx.save_for_backward(logits, *output[2:])
    ctx.settings = group, implementation
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_multi_hot(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return multi_hot_gradient(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 6


multi_hot_loss.register_autograd(_differentiate_multi_hot, setup_context=_keep_logits)


@torch.library.custom_op("megatron_tst::linear_multi_hot_loss", mutates_args=())
def linear_multi_hot_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    group: str | None,
    sequence_parallel: bool,
    ignore_index: int,
    implementation: str,
    by_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``linear_multi_hot_cross_entropy`` of [..., h], [v, h], [..., s]."""
    layout = Layout(group_of(group), sequence_parallel, False)
    vocabulary_size = weight.shape[0] * group_size(layout.tp_group)
    validate_target_values(targets, vocabulary_size, ignore_index)
    ctx = _Context()
    by = kernels_for(cast(Implementation, implementation), hidden)
    losses = LinearMultiHotCrossEntropy.forward(
        ctx, hidden, weight, targets, target_weights, ignore_index, layout, by, by_offset, None
    )
    _, _, columns, shares, live, log_sum_exp, *_ = ctx.saved_tensors
    statistics = cast(Tensor, log_sum_exp).unsqueeze(0)
    return _outputs(*losses, columns, shares, live, statistics)


@linear_multi_hot_loss.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> Losses:
    loss, offset, *kept = _fake_outputs(
        hidden, targets.reshape(-1, targets.shape[-1]).contiguous(), settings[-1], statistics=1
    )
    offset = offset.view(targets.shape) if settings[-1] else offset
    return cast(Losses, (loss.view(targets.shape[:-1]), offset, *kept))


@torch.library.custom_op("megatron_tst::linear_multi_hot_gradients", mutates_args=())
def linear_multi_hot_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    shares: Tensor,
    live: Tensor,
    statistics: Tensor,
    group: str | None,
    sequence_parallel: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden states and the weight of ``linear_multi_hot_loss``."""
    ctx = _Context(
        *(hidden, weight, columns, shares, live, statistics[0]),
        layout=Layout(group_of(group), sequence_parallel, False),
        by=kernels_for(cast(Implementation, implementation), hidden),
        main_grad=None,
        expected=None,
        adds_here=False,
    )
    return cast(tuple[Tensor, Tensor], LinearMultiHotCrossEntropy.backward(ctx, grad, None)[:2])


@linear_multi_hot_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *kept: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    hidden, weight, _, _, group, sequence_parallel, _, implementation, _ = inputs
    ctx.save_for_backward(hidden, weight, *output[2:])
    ctx.settings = group, sequence_parallel, implementation
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_linear(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *linear_multi_hot_gradients(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 7


linear_multi_hot_loss.register_autograd(_differentiate_linear, setup_context=_keep_operands)


def _loss_function(implementation: str, logits: Tensor, group: str | None) -> Any:
    chosen = cast(Implementation, implementation)
    return cross_entropy.function_for(chosen, logits, group_of(group))


def _outputs(loss: Tensor, by_offset: Tensor | None, *kept: Any) -> Losses:
    # Each of its own memory, as the outputs of an operator are to be.
    offset = loss.new_empty(0) if by_offset is None else by_offset
    return cast(Losses, (loss.clone(), offset, *kept))


def _fake_outputs(rows: Tensor, targets: Tensor, by_offset: bool, statistics: int) -> Losses:
    wide = torch.promote_types(rows.dtype, torch.float32)
    count, bag_size = targets.shape
    return (
        rows.new_empty(count, dtype=wide),
        rows.new_empty((count, bag_size) if by_offset else (0,), dtype=wide),
        torch.empty_like(targets),
        rows.new_empty(count, bag_size, dtype=wide),
        rows.new_empty(count, dtype=torch.bool),
        rows.new_empty(statistics, count, dtype=wide),
    )
