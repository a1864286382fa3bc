"""The gradients of a step on a CPU, around Megatron's own handling of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_tst.ops.native import kernels

Hook = Callable[..., None]

# Elements that are widened at once; they stay in a core's cache.
_BLOCK = 1 << 16


def add_in_blocks(make_hook: Callable[..., Hook]) -> Callable[..., Hook]:
    """Wraps ``DistributedDataParallel._make_backward_post_hook``.

    On a CPU torch adds a bfloat16 tensor to a float32 one by way of a float32 copy of the whole
    tensor. The kernels need none, to the same bits. The hook leaves out the addition of a gradient
    that is marked as added.
    """

    @functools.wraps(make_hook)
    def make_hook_in_blocks(self: Any, param: Any) -> Hook:
        hook = make_hook(self, param)

        def add_and_hook(*arguments: Any) -> None:
            grad = param.grad
            is_added = grad is None or param.grad_added_to_main_grad
            if is_added or grad.dtype == param.main_grad.dtype:
                hook(*arguments)
                return
            _add(param.main_grad, grad)
            # Of a weight that two layers share the hook would add it all the same.
            is_shared = getattr(param, "zero_out_wgrad", False)
            param.grad_added_to_main_grad, param.zero_out_wgrad = True, False
            try:
                hook(*arguments)
            finally:
                # The next micro-batch has another gradient.
                param.grad_added_to_main_grad, param.zero_out_wgrad = False, is_shared

        return add_and_hook

    return make_hook_in_blocks


def for_experts(reset: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``reset_model_temporary_tensors``, which looks for routers among all modules."""

    @functools.wraps(reset)
    def reset_where_there_are_experts(config: Any, model: Any) -> None:
        if config.num_moe_experts is not None:
            reset(config, model)

    return reset_where_there_are_experts


def _add(total: Tensor, addend: Tensor) -> None:
    compiled = kernels()
    are_usual = total.dtype == torch.float32 and total.is_contiguous() and addend.is_contiguous()
    if compiled is not None and are_usual and compiled.serves(addend):
        compiled.add_widened_(total, addend)
        return
    for part, values in zip(
        total.view(-1).split(_BLOCK), addend.flatten().split(_BLOCK), strict=True
    ):
        part.add_(values)
