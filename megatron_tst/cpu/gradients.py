"""Adds gradients to Megatron's float32 buffer without a float32 copy of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

Hook = Callable[..., None]

# Elements that are widened at once; they stay in a core's cache.
_BLOCK = 1 << 16


def add_in_blocks(make_hook: Callable[..., Hook]) -> Callable[..., Hook]:
    """Wraps ``DistributedDataParallel._make_backward_post_hook``.

    On a CPU torch adds a bfloat16 tensor to a float32 one by way of a float32 copy of the whole
    tensor. The hook leaves out the addition of a gradient that is marked as added.
    """

    @functools.wraps(make_hook)
    def make_hook_in_blocks(self: Any, param: Any) -> Hook:
        hook = make_hook(self, param)

        def add_and_hook(*arguments: Any) -> None:
            grad = param.grad
            is_added = grad is None or param.grad_added_to_main_grad
            if is_added or grad.numel() <= _BLOCK or grad.dtype == param.main_grad.dtype:
                hook(*arguments)
                return
            _add(param.main_grad, grad)
            param.grad_added_to_main_grad = True
            try:
                hook(*arguments)
            finally:
                # The next micro-batch has another gradient.
                param.grad_added_to_main_grad = False

        return add_and_hook

    return make_hook_in_blocks


def _add(total: Tensor, addend: Tensor) -> None:
    for part, values in zip(
        total.view(-1).split(_BLOCK), addend.flatten().split(_BLOCK), strict=True
    ):
        part.add_(values)
