"""What computes the linear loss: its autograd function, and which gradients it knows beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import (
    all_gather_from_sequence_parallel,
    all_reduce_sum_,
    group_size,
    join_shards,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_tst.ops.logit_blocks import (
    Kernels,
    add_product_,
    add_scaled_,
    add_transposed_product_,
    columns_in_block,
    into_gradient_,
    position_blocks,
    scaled,
    statistics,
    vocabulary_blocks,
)
from megatron_tst.ops.targets import bag_coefficients, to_local_targets

# A gradient this near to what was expected is the same number, which was computed in another order.
_SAME_NUMBER = 2.0**-21


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

    def reduce_gradient(self, grad: Tensor, hidden: Tensor) -> Callable[[], Tensor]:
        """Starts to sum up the gradients of all shards, [n, h]; what to call for the sum.

        It has the shape of the hidden states.
        """
        if self.sequence_parallel:
            return start_reduce_scatter(grad.view(-1, *hidden.shape[1:]), self.tp_group)
        return start_all_reduce(grad.view(hidden.shape), self.tp_group)

    def main_grad(self, weight: Tensor) -> Tensor | None:
        """Where the gradient is added; a model without Megatron's DDP has none, as in the host."""
        return getattr(weight, "main_grad", None) if self.accumulates_into_main_grad else None


class Expected(NamedTuple):
    """What is known of the gradient of the losses before it comes.

    Attributes:
        number: of each position that counts, [], or what stands for it.
        is_known: it is the number.
    """

    number: Tensor
    is_known: bool


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
        by: Kernels,
        by_offset: bool,
        expected: Expected | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [...] and, if asked for, those of each target, [..., s]."""
        # 1. Share of each target, zero on the ranks that do not hold it.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        targets = target_bags.reshape(-1, target_bags.shape[-1]).contiguous()
        valid = targets != ignore_index
        shares, live = bag_coefficients(targets, target_weights, ignore_index, dtype)
        columns, inside = to_local_targets(targets, valid, len(weight), layout.tp_group)
        shares.masked_fill_(~inside, 0)
        # 2. Room for the gradients, if the forward computes them.
        states, main_grad = layout.gather(hidden), layout.main_grad(weight)
        scale = of_states = of_weight = None
        adds_here = False
        if expected is not None:
            scale = _scale_of(expected.number, live, dtype)
            of_states = torch.zeros_like(states, dtype=dtype)
            is_wide = main_grad is not None and main_grad.dtype == dtype
            adds_here = expected.is_known and is_wide and not states.is_cuda
            of_weight = main_grad if adds_here else torch.zeros_like(weight, dtype=dtype)
        # 3. A block of positions at a time: statistics of the whole vocabulary, and gradients.
        log_sum_exp, target_logit = torch.empty(2, len(states), dtype=dtype, device=states.device)
        target_logits = torch.empty_like(shares) if by_offset else None
        for logits, rows in position_blocks(by, states, weight):
            own, part = columns[rows], shares[rows]
            if target_logits is not None:
                target_logits[rows] = logits.gather(-1, own).to(dtype)
            log_sum_exp[rows], target_logit[rows] = _statistics_and_gradient_(
                by, logits, own, part, None if scale is None else scale[rows], layout.tp_group
            )
            if of_states is not None:
                assert of_weight is not None
                add_product_(by, of_states[rows], logits, weight)
                add_transposed_product_(by, of_weight, logits, states[rows])
        ctx.save_for_backward(
            *(hidden, weight, columns, shares, live, log_sum_exp),
            *(of_states, None if adds_here else of_weight),
        )
        ctx.layout, ctx.by, ctx.main_grad = layout, by, main_grad
        ctx.expected, ctx.adds_here = expected, adds_here
        loss = (log_sum_exp - target_logit).masked_fill_(~live, 0).view(target_bags.shape[:-1])
        if target_logits is None:
            return loss, None
        target_logits = all_reduce_sum_(target_logits.masked_fill_(~inside, 0), layout.tp_group)
        offset_losses = (log_sum_exp.unsqueeze(-1) - target_logits).masked_fill_(~valid, 0)
        offset_losses = offset_losses.view(target_bags.shape)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the hidden states and of the weight."""
        factor = _factor_of_known(ctx, grad_output)
        gradients = _scaled if factor is not None else _computed_again
        grad_hidden, grad_weight = gradients(ctx, grad_output if factor is None else factor)
        if ctx.main_grad is not None:
            grad_weight = _placeholder(ctx.saved_tensors[1])
        return grad_hidden, grad_weight, *[None] * 7


def _statistics_and_gradient_(
    by: Kernels,
    logits: Tensor,
    columns: Tensor,
    shares: Tensor,
    scale: Tensor | None,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and weighted target logit of the whole vocabulary, [n] each.

    With a scale the logits become their gradient.
    """
    if scale is not None and by == "triton" and group_size(tp_group) == 1:
        from megatron_tst.ops.kernels import cross_entropy as triton_kernels

        # Rows at other places cost it registers that it does not have.
        if triton_kernels.rows_are_aligned(logits):
            return triton_kernels.statistics_then_gradient(logits, columns, shares, scale)
    result = join_shards(*statistics(by, logits, columns, shares), tp_group)
    if scale is not None:
        into_gradient_(by, logits, columns, shares, result[0], scale)
    return result


def _scale_of(number: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """One number for each position that counts, [n]."""
    return number.to(dtype).expand(len(live)).masked_fill(~live, 0)


def _factor_of_known(ctx: Any, grad_output: Tensor) -> Tensor | None:
    """By what the gradients of the forward are multiplied; None: they are of no use, or none."""
    if ctx.expected is None:
        return None
    number = _common_number(grad_output, ctx.saved_tensors[4])
    if number is None:
        return None
    factor = number / ctx.expected.number.to(number.dtype)
    is_as_added = not ctx.adds_here or bool((factor - 1).abs() <= _SAME_NUMBER)
    return factor if is_as_added else None


def _common_number(grad: Tensor, live: Tensor) -> Tensor | None:
    """The number that all positions that count have for a gradient, [], or None.

    A number that is expanded, as the backward of a sum does it, has strides of 0, which the host
    sees without waiting for a GPU. Numbers are compared on a CPU only.
    """
    if grad.numel() == 0:
        return grad.new_ones(())
    if all(
        stride == 0 or size == 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
    ):
        return grad[(0,) * grad.dim()]
    if grad.device.type != "cpu":
        return None
    numbers = grad.reshape(-1)[live]
    if len(numbers) == 0:
        return grad.new_ones(())
    return numbers[0] if bool((numbers == numbers[0]).all()) else None


def _scaled(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    hidden, weight, *_, of_states, of_weight = ctx.saved_tensors
    reduction = ctx.layout.reduce_gradient(scaled(of_states, factor, hidden.dtype), hidden)
    grad_weight = None
    if ctx.main_grad is None:
        grad_weight = scaled(of_weight, factor, weight.dtype)
    elif not ctx.adds_here:
        add_scaled_(ctx.main_grad, of_weight, factor)
    return reduction(), grad_weight


def _computed_again(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients from logits that are computed once more, a block of the vocabulary at a time."""
    hidden, weight, columns, shares, live, log_sum_exp, *_ = ctx.saved_tensors
    states = ctx.layout.gather(hidden)
    if ctx.adds_here:
        _take_back(ctx, states)
    scale = grad_output.reshape(-1).masked_fill(~live, 0)
    grad_states = torch.zeros_like(states, dtype=log_sum_exp.dtype)
    grad_weight = torch.empty_like(weight) if ctx.main_grad is None else None
    for logits, rows in vocabulary_blocks(ctx.by, states, weight):
        own, outside = columns_in_block(columns, rows)
        into_gradient_(ctx.by, logits, own, shares.masked_fill(outside, 0), log_sum_exp, scale)
        add_product_(ctx.by, grad_states, logits, weight[rows])
        if grad_weight is None:
            add_transposed_product_(ctx.by, ctx.main_grad[rows], logits, states)
        else:
            torch.mm(logits.t(), states, out=grad_weight[rows])
    return ctx.layout.reduce_gradient(grad_states.to(hidden.dtype), hidden)(), grad_weight


def _take_back(ctx: Any, states: Tensor) -> None:
    """Subtracts from ``main_grad`` what the forward added, by the same products."""
    _, weight, columns, shares, live, log_sum_exp, *_ = ctx.saved_tensors
    scale = _scale_of(-ctx.expected.number, live, log_sum_exp.dtype)
    for logits, rows in position_blocks(ctx.by, states, weight):
        own, part = columns[rows], shares[rows]
        into_gradient_(ctx.by, logits, own, part, log_sum_exp[rows], scale[rows])
        add_transposed_product_(ctx.by, ctx.main_grad, logits, states[rows])
    # Another backward of this graph finds nothing to take back, and nothing that is known.
    ctx.expected, ctx.adds_here = None, False


def _placeholder(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in ``main_grad`` already, as in the host."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # The host's hooks wait for a gradient of the shape of the weight and do not read it.
    zero_out = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zero_out else torch.empty_like(weight)
