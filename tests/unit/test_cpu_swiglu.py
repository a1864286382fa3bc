"""SwiGLU of the CPU platform against torch's autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_tst.cpu.swiglu import SwiGLU, bias_swiglu, weighted_swiglu


def plain(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu(gate) * up


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 2, 2 * 160), (5, 2 * 7), (0, 8)])
def test_it_is_what_autograd_makes_of_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    ours, theirs = bias_swiglu(x, None), plain(x)
    grad = draw(*theirs.shape, dtype=dtype).detach()
    # torch computes the last elements of a row without vectors, which differs in the last bit.
    torch.testing.assert_close(ours, theirs)
    (ours_grad,), (theirs_grad,) = (torch.autograd.grad(y, x, grad) for y in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_the_gradient_is_the_derivative() -> None:
    assert torch.autograd.gradcheck(SwiGLU.apply, draw(3, 8).double().detach().requires_grad_())


def test_bias_and_weights_are_differentiated() -> None:
    x, bias, weights = draw(6, 8, dtype=torch.bfloat16), draw(8, dtype=torch.bfloat16), draw(6, 1)
    ours = (bias_swiglu(x, bias), weighted_swiglu(x, None, weights))
    theirs = (plain(x + bias), (plain(x) * weights).bfloat16())
    for mine, reference, inputs in zip(ours, theirs, ((x, bias), (x, weights)), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, reference)
        grad = torch.ones_like(mine)
        for ours_grad, theirs_grad in zip(
            torch.autograd.grad(mine, inputs, grad),
            torch.autograd.grad(reference, inputs, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours_grad, theirs_grad)


def test_a_clamp_bounds_both_halves() -> None:
    x = (4 * draw(64, 8)).detach().requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    theirs = silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5)
    ours = bias_swiglu(x, None, clamp_value=1.5)
    torch.testing.assert_close(ours, theirs)
    weighted = weighted_swiglu(x, None, torch.full((64, 1), 0.5), clamp_value=1.5)
    torch.testing.assert_close(weighted, 0.5 * theirs)
    grad = torch.ones_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))
