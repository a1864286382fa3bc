"""Output layer and multi-hot cross-entropy together, one block of the logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import group_name, group_size
from megatron_tst.ops.kernels.launch import Implementation
from megatron_tst.ops.linear_function import Expected, Layout, LinearMultiHotCrossEntropy
from megatron_tst.ops.logit_blocks import kernels_for
from megatron_tst.ops.targets import (
    IGNORE_INDEX,
    TargetWeights,
    as_ids,
    as_weights,
    validate_targets,
)


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    sequence_parallel: bool = False,
    accumulate_into_main_grad: bool = False,
    implementation: Implementation = "auto",
    uniform_gradient: bool = False,
    expected_gradient: Tensor | None = None,
) -> Tensor:
    """``multi_hot_cross_entropy(hidden @ weight.T, target_bags)``, whose logits are never whole.

    Logits exist for a block of positions at a time, over the whole vocabulary shard. Where the
    caller says that all positions that count will have the same gradient, as those of a sum have,
    the forward turns them into their gradient in place, and multiplies it with the hidden states
    and with the weight: three matrix products, as whole logits take. The backward multiplies the
    results by the gradient that comes, which is exact for any number. For a gradient that is not
    one number, and where nothing was said, the backward computes the logits once more, a block of
    the vocabulary at a time: four products, and right for any gradient. Without gradients
    (``torch.no_grad``) there is one product.

    Whether it is one number is seen without waiting for a GPU: what the backward of a sum expands
    has strides of 0. So let positions that do not count have targets of ``ignore_index`` and add
    the losses up; a product with a mask leaves a gradient without these strides, which is compared
    on a CPU, and takes the logits once more on a GPU.

    Logits have the dtype of ``hidden``, as the host's; under autocast that of autocast, as
    ``torch.nn.functional.linear`` makes them. Statistics are float32 (float64 for
    float64), and so are the sums over blocks: of the weight's gradient, in room of its size, with
    three products; of the hidden states' always.

    Collectives: an all-gather of the hidden states under sequence parallelism, in the forward, and
    in a backward with logits once more; two all-reduces for each block of positions, of one and of
    two numbers each; in the backward one all-reduce of the gradient of the hidden states, or a
    reduce-scatter under sequence parallelism, while that of the weight is added.

    Args:
        hidden: [..., h], the same on every rank of the group; under sequence parallelism
            [l / tp, b, h], this rank's positions.
        weight: [v, h], this rank's contiguous vocabulary rows.
        target_bags: [..., s] integers, global token ids for all positions, the same on every rank.
        target_weights: [s] numbers or a tensor, not negative; ``None`` means uniform.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        ignore_index: target id that does not count.
        sequence_parallel: the hidden states are split along dimension 0.
        accumulate_into_main_grad: add the weight's gradient to ``weight.main_grad``, where there is
            one and in its dtype, as the host does under ``--gradient-accumulation-fusion``.
            ``weight.grad`` gets a placeholder. Not under ``torch.compile`` nor for a weight that
            autocast casts.
        implementation: of what happens to the logits of a block: ``torch``, ``triton``, or
            ``auto``: Triton on CUDA, where it is installed, the kernels of
            ``megatron_tst.ops.native`` on a CPU with one thread, where they can be compiled.
        uniform_gradient: all positions that count will have the same gradient. A mistake costs
            time. Not heeded under ``torch.compile``, whose gradients have strides of their own.
        expected_gradient: that gradient, one number, not 0, if the caller knows it. On a CPU the
            forward then adds the weight's gradient to a ``main_grad`` in float32 and needs no room
            for it, so that a backward has to follow; one that brings another number takes it back.

    Returns:
        [...] loss a position, float32 (float64 for float64), the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit, or (checked on the CPU only) a target lies outside
            the vocabulary.

    Source: arXiv 2605.06546, multi-hot cross-entropy; ``ColumnParallelLinear`` in
    ``megatron/core/tensor_parallel/layers.py`` for what surrounds the product.
    """
    loss, _ = _linear_multi_hot_cross_entropy(
        hidden,
        weight,
        target_bags,
        target_weights,
        ignore_index,
        Layout(tp_group, sequence_parallel, accumulate_into_main_grad),
        implementation,
        _expected(uniform_gradient, expected_gradient, hidden),
        by_offset=False,
    )
    return loss


def linear_multi_hot_cross_entropy_by_offset(
    hidden: Tensor,
    weight: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    sequence_parallel: bool = False,
    accumulate_into_main_grad: bool = False,
    implementation: Implementation = "auto",
    uniform_gradient: bool = False,
    expected_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`linear_multi_hot_cross_entropy`, and those of each target, [..., s].

    The latter have no gradient and take one more all-reduce, of s numbers a position. Arguments and
    errors are those of :func:`linear_multi_hot_cross_entropy`.
    """
    loss, by_offset = _linear_multi_hot_cross_entropy(
        hidden,
        weight,
        target_bags,
        target_weights,
        ignore_index,
        Layout(tp_group, sequence_parallel, accumulate_into_main_grad),
        implementation,
        _expected(uniform_gradient, expected_gradient, hidden),
        by_offset=True,
    )
    assert by_offset is not None
    return loss, by_offset


def _expected(is_uniform: bool, number: Tensor | None, hidden: Tensor) -> Expected | None:
    if not (is_uniform or number is not None) or not torch.is_grad_enabled():
        return None
    if number is not None:
        return Expected(number.detach().reshape(()), True)
    return Expected(torch.ones((), device=hidden.device), False)


def _linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None,
    ignore_index: int,
    layout: Layout,
    implementation: Implementation,
    expected: Expected | None,
    by_offset: bool,
) -> tuple[Tensor, Tensor | None]:
    weights, target_bags = as_weights(target_weights), as_ids("target_bags", target_bags)
    given = weight
    hidden, weight = _autocast(hidden), _autocast(weight)
    if hidden.shape[-1] != weight.shape[-1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} does not fit weight "
            f"{tuple(weight.shape)} {weight.dtype}: pass [..., h] and [v, h] of one dtype, or call "
            "it under torch.autocast."
        )
    is_compiling = torch.compiler.is_compiling()
    if layout.accumulates_into_main_grad and (is_compiling or weight is not given):
        raise ValueError(
            "accumulate_into_main_grad is True, and there is no main_grad under torch.compile nor "
            "of a weight that autocast casts: pass False."
        )
    positions = list(target_bags.shape[:-1])
    shards = group_size(layout.tp_group) if layout.sequence_parallel else 1
    if [hidden.shape[0] * shards, *hidden.shape[1:-1]] != positions:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not fit target_bags {tuple(target_bags.shape)}: "
            f"pass [..., h] and [..., s] of the same positions ({shards} slices of dimension 0)."
        )
    logits_shape = [*positions, weight.shape[0]]
    validate_targets(logits_shape, target_bags, weights, layout.tp_group, ignore_index)
    if is_compiling:
        from megatron_tst.ops.compiled import linear_multi_hot_loss

        name, is_split = group_name(layout.tp_group), layout.sequence_parallel
        loss, offset_losses = linear_multi_hot_loss(
            hidden, weight, target_bags, weights, name, is_split, ignore_index, implementation,
            by_offset,
        )[:2]  # fmt: skip
        return loss, offset_losses if by_offset else None
    if not (hidden.requires_grad or weight.requires_grad):
        expected = None
    by = kernels_for(implementation, hidden)
    result: tuple[Tensor, Tensor | None] = LinearMultiHotCrossEntropy.apply(
        hidden, weight, target_bags, weights, ignore_index, layout, by, by_offset, expected
    )
    return result


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as a matrix product under autocast takes it."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
