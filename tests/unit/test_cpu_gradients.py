"""Gradients added to Megatron's float32 buffer in blocks, by Megatron's own hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors

from megatron_tst.cpu import gradients
from megatron_tst.cpu.gradients import _BLOCK, add_in_blocks, for_experts


def backward_hook(param: Any) -> Any:
    """The hook that Megatron registers for a parameter, wrapped."""
    ddp: Any = SimpleNamespace(
        param_to_bucket_group={param: None},
        ddp_config=SimpleNamespace(overlap_grad_reduce=False),
    )
    # Unwrapped where another test has switched the CPU platform on in this process.
    make_hook = DistributedDataParallel._make_backward_post_hook
    make_hook = getattr(make_hook, "__wrapped__", make_hook)
    return add_in_blocks(make_hook)(ddp, param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 5), (2, _BLOCK // 2 + 3)])
@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_every_micro_batch_is_added_once(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    has_kernels: bool,
    is_transposed: bool,
    is_shared: bool,
) -> None:
    if not has_kernels:
        monkeypatch.setattr(gradients, "kernels", lambda: None)
    generator = torch.Generator().manual_seed(0)
    param: Any = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.main_grad = torch.randn(shape, generator=generator)
    param.grad_added_to_main_grad = False
    # As of an embedding that is the output layer too.
    param.zero_out_wgrad = is_shared
    hook, expected = backward_hook(param), param.main_grad.clone()
    for _ in range(2):
        grad = torch.randn(shape[::-1], generator=generator).to(dtype).t()
        # Transposed: its memory is not in the order of its elements.
        param.grad = grad if is_transposed else grad.contiguous()
        expected += param.grad
        hook()
        assert param.grad is None
        assert torch.equal(param.main_grad, expected)
        assert param.zero_out_wgrad == is_shared


def test_a_gradient_that_a_fused_kernel_has_added_is_left_out() -> None:
    param: Any = torch.nn.Parameter(torch.zeros(2 * _BLOCK, dtype=torch.bfloat16))
    param.main_grad, param.grad_added_to_main_grad = torch.zeros(2 * _BLOCK), True
    param.grad = torch.ones_like(param)
    backward_hook(param)()
    assert param.grad is None
    assert param.grad_added_to_main_grad
    assert not param.main_grad.any()


@pytest.mark.parametrize("experts", [None, 2])
def test_routers_are_reset_where_there_are_experts(experts: int | None) -> None:
    config: Any = SimpleNamespace(
        num_moe_experts=experts,
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
    )
    router: Any = torch.nn.Module()
    router.expert_bias, router.local_tokens_per_expert = torch.zeros(2), torch.ones(2)
    reset = getattr(reset_model_temporary_tensors, "__wrapped__", reset_model_temporary_tensors)
    for_experts(reset)(config, [torch.nn.ModuleList([router])])
    assert bool(router.local_tokens_per_expert.any()) == (experts is None)
