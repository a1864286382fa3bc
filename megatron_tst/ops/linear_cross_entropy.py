"""Output layer and multi-hot cross-entropy together, one block of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import (
    all_gather_from_sequence_parallel,
    all_reduce_sum_,
    group_name,
    group_size,
    join_shards,
    reduce_scatter_to_sequence_parallel,
)
from megatron_tst.ops.kernels.launch import Implementation, uses_triton
from megatron_tst.ops.targets import (
    IGNORE_INDEX,
    TargetWeights,
    as_ids,
    as_weights,
    bag_coefficients,
    to_local_targets,
    validate_targets,
)
from megatron_tst.ops.torch_cross_entropy import exponentials

# Logits of a block: large enough for efficient products, small beside the activations of a model.
_BLOCK_ELEMENTS_CPU = 1 << 24
_BLOCK_ELEMENTS_GPU = 1 << 27


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
) -> Tensor:
    """``multi_hot_cross_entropy(hidden @ weight.T, target_bags)``, whose logits are never whole.

    A block of the vocabulary at a time, its logits are computed and folded into a running maximum
    and sum of exponentials. The backward computes them once more, turns them into their gradient
    in place, and multiplies it with the hidden states and with the weight. So the output layer
    costs four matrix products instead of three, and memory for one block of logits.

    Logits have the dtype of ``hidden``, as the host's; under autocast that of autocast, as
    ``torch.nn.functional.linear`` makes them. Statistics are float32 (float64 for
    float64). The weight's gradient of a block is one matrix product over all positions, as the
    host's; that of the hidden states adds the products of the blocks up in float32.

    Collectives: an all-gather of the hidden states under sequence parallelism, in each pass; two
    all-reduces in the forward, of one and of two numbers a position; in the backward one all-reduce
    of the gradient of the hidden states, or a reduce-scatter under sequence parallelism.

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
            ``auto``, which takes Triton on CUDA, where it is installed.

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
        by_offset=True,
    )
    assert by_offset is not None
    return loss, by_offset


class Layout(NamedTuple):
    """Where the operands lie, and where the weight's gradient goes."""

    tp_group: ProcessGroup | None
    sequence_parallel: bool
    accumulates_into_main_grad: bool

    def gather(self, hidden: Tensor) -> Tensor:
        """All positions, [n, h]."""
        if self.sequence_parallel:
            hidden = all_gather_from_sequence_parallel(hidden, self.tp_group)
        return hidden.reshape(-1, hidden.shape[-1])

    def reduce_gradient(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Sums the gradients of all shards: [n, h] -> the shape of the hidden states."""
        if self.sequence_parallel:
            whole = grad.view(-1, *hidden.shape[1:])
            return reduce_scatter_to_sequence_parallel(whole, self.tp_group)
        return all_reduce_sum_(grad, self.tp_group).view(hidden.shape)


def _linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None,
    ignore_index: int,
    layout: Layout,
    implementation: Implementation,
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
    fused = uses_triton(implementation, hidden)
    result: tuple[Tensor, Tensor | None] = LinearMultiHotCrossEntropy.apply(
        hidden, weight, target_bags, weights, ignore_index, layout, fused, by_offset
    )
    return result


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as a matrix product under autocast takes it."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class LinearMultiHotCrossEntropy(torch.autograd.Function):
    """[..., h], [v, h], [..., s] -> [...]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_bags: Tensor,
        target_weights: Tensor | None,
        ignore_index: int,
        layout: Layout,
        fused: bool,
        by_offset: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [...] and, if asked for, those of each target, [..., s]."""
        # 1. Share of each target, zero on the ranks that do not hold it.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        targets = target_bags.reshape(-1, target_bags.shape[-1])
        valid = targets != ignore_index
        coefficients, live = bag_coefficients(targets, target_weights, ignore_index, dtype)
        columns, inside = to_local_targets(targets, valid, len(weight), layout.tp_group)
        coefficients.masked_fill_(~inside, 0)
        # 2. Running maximum and sum of exponentials of this shard, and the logits of its targets.
        states = layout.gather(hidden)
        maximum = states.new_full((len(states),), -torch.inf, dtype=dtype)
        sums, target_logits = torch.zeros_like(maximum), torch.zeros_like(coefficients)
        for logits, first in _blocks(states, weight):
            own, outside = _columns_in_block(columns, first, logits.shape[1])
            target_logits += logits.gather(1, own).to(dtype).masked_fill_(outside | ~inside, 0)
            if fused:
                highest, block_sums = _fused_statistics(logits)
                higher = torch.maximum(maximum, highest)
                block_sums.mul_((highest - higher).exp_())
            else:
                higher = torch.maximum(maximum, logits.amax(-1).to(dtype))
                block_sums = _sum_exponentials(logits, higher)
            sums.mul_((maximum - higher).exp_()).add_(block_sums)
            maximum = higher
        # 3. The whole vocabulary.
        weighted = (target_logits * coefficients).sum(-1)
        log_sum_exp, target_logit = join_shards(maximum, sums, weighted, layout.tp_group)
        ctx.save_for_backward(hidden, weight, columns, coefficients, live, log_sum_exp)
        ctx.layout, ctx.fused = layout, fused
        # A model without Megatron's DDP has none, as in the host.
        has_main_grad = layout.accumulates_into_main_grad and hasattr(weight, "main_grad")
        ctx.main_grad = cast(Any, weight).main_grad if has_main_grad else None
        loss = (log_sum_exp - target_logit).masked_fill_(~live, 0).view(target_bags.shape[:-1])
        if not by_offset:
            return loss, None
        target_logits = all_reduce_sum_(target_logits, layout.tp_group)
        offset_losses = (log_sum_exp.unsqueeze(-1) - target_logits).masked_fill_(~valid, 0)
        offset_losses = offset_losses.view(target_bags.shape)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the hidden states and of the weight."""
        hidden, weight, columns, coefficients, live, log_sum_exp = ctx.saved_tensors
        layout: Layout = ctx.layout
        states = layout.gather(hidden)
        scale = grad_output.reshape(-1).masked_fill(~live, 0)
        grad_states = torch.zeros_like(states, dtype=log_sum_exp.dtype)
        product = torch.empty_like(states)
        grad_weight = torch.empty_like(weight) if ctx.main_grad is None else None
        for logits, first in _blocks(states, weight):
            own, outside = _columns_in_block(columns, first, logits.shape[1])
            shares = coefficients.masked_fill(outside, 0)
            into_gradient_ = _fused_into_gradient_ if ctx.fused else _into_gradient_
            into_gradient_(logits, own, shares, log_sum_exp, scale)
            rows = slice(first, first + logits.shape[1])
            grad_states += torch.mm(logits, weight[rows], out=product)
            if grad_weight is None:
                _add_product_(ctx.main_grad[rows], logits.t(), states)
            else:
                torch.mm(logits.t(), states, out=grad_weight[rows])
        del product
        grad_hidden = layout.reduce_gradient(grad_states.to(hidden.dtype), hidden)
        if grad_weight is None:
            grad_weight = _placeholder(weight)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _blocks(states: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Logits [n, block] of each block of the vocabulary, in one buffer, and its first row."""
    elements = _BLOCK_ELEMENTS_CPU if states.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    # A multiple of 256, which suits the tiles of a matrix product.
    width = min(max(elements // max(len(states), 1) // 256 * 256, 256), len(weight))
    buffer = states.new_empty(len(states) * width)
    for first in range(0, len(weight), width):
        rows = weight[first : first + width]
        logits = buffer[: len(states) * len(rows)].view(len(states), len(rows))
        yield torch.mm(states, rows.t(), out=logits), first


def _columns_in_block(columns: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a block, 0 for those of other blocks, and which those are."""
    shifted = columns - first
    outside = (shifted < 0) | (shifted >= width)
    return shifted.masked_fill_(outside, 0), outside


def _sum_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    """``sum_v exp(z_v - maximum)`` of a block: [n, block], [n] -> [n]."""
    sums = torch.empty_like(maximum)
    for wide, rows in exponentials(logits, maximum):
        torch.sum(wide, -1, out=sums[rows])
    return sums


def _fused_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of a block, and its sum of exponentials relative to it: [n, block] -> [n], [n]."""
    from megatron_tst.ops.kernels.cross_entropy import shard_statistics

    no_target = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    maximum, sums, _ = shard_statistics(logits, no_target, no_target.float())
    return maximum, sums


def _fused_into_gradient_(
    logits: Tensor, columns: Tensor, shares: Tensor, log_sum_exp: Tensor, scale: Tensor
) -> None:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient

    shard_gradient(logits, columns, shares, log_sum_exp, scale, out=logits)


def _into_gradient_(
    logits: Tensor, columns: Tensor, shares: Tensor, log_sum_exp: Tensor, scale: Tensor
) -> None:
    """Overwrites the logits of a block with their gradient."""
    negated, scale = -shares, scale.unsqueeze(-1)
    for wide, rows in exponentials(logits, log_sum_exp):
        wide.scatter_add_(-1, columns[rows], negated[rows]).mul_(scale[rows])
        logits[rows] = wide


def _add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right``, not rounded to the dtype of the operands before it is added."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif sums.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        sums += torch.mm(left, right, out_dtype=sums.dtype)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype))


def _placeholder(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in ``main_grad`` already, as in the host."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # The host's hooks wait for a gradient of the shape of the weight and do not read it.
    zero_out = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zero_out else torch.empty_like(weight)
