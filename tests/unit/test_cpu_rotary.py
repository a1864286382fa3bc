"""Rotary position embeddings of the CPU platform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_tst.cpu.rotary import Rotation, in_fewer_passes

# Under the CPU platform the module's own is wrapped.
UPSTREAM = getattr(
    rope_utils._apply_rotary_pos_emb_bshd, "__wrapped__", rope_utils._apply_rotary_pos_emb_bshd
)


def case(dtype: torch.dtype, rotated: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are a slice of a wider tensor, as in attention; their gradient; angles."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(12, 3, 2, 48, generator=generator).to(dtype)
    grad = torch.randn(12, 3, 2, 16, generator=generator).to(dtype)
    angles = torch.arange(12.0).unsqueeze(-1) * torch.logspace(0, -3, rotated // 2)
    return fused[..., :16], grad, torch.cat((angles, angles), -1)[:, None, None]


def results(function: Any, t: Tensor, grad: Tensor, *of: Any, **more: Any) -> tuple[Tensor, Tensor]:
    t = t.detach().requires_grad_()
    output = function(t, *of, **more)
    return output.detach(), torch.autograd.grad(output, t, grad)[0]


@pytest.mark.parametrize("mscale", [1.0, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_upstreams(dtype: torch.dtype, mscale: float) -> None:
    t, grad, freqs = case(dtype)
    ours = results(in_fewer_passes(UPSTREAM), t, grad, freqs, mscale=mscale)
    upstream = results(UPSTREAM, t, grad, freqs, mscale=mscale)
    assert all(torch.equal(*pair) for pair in zip(ours, upstream, strict=True))
    assert not torch.equal(ours[0], t)


@pytest.mark.parametrize("shape", [(12, 3, 1, 16), (12, 3, 2, 16)])
def test_angles_of_each_sequence_and_head(shape: tuple[int, ...]) -> None:
    t, grad, _ = case(torch.bfloat16)
    freqs = torch.randn(shape)
    ours = results(in_fewer_passes(UPSTREAM), t, grad, freqs)
    upstream = results(UPSTREAM, t, grad, freqs)
    assert all(torch.equal(*pair) for pair in zip(ours, upstream, strict=True))


def test_result_is_contiguous_where_the_queries_are_not() -> None:
    t, grad, freqs = case(torch.float32)
    t = t.transpose(0, 1).contiguous().transpose(0, 1)
    ours = results(in_fewer_passes(UPSTREAM), t, grad, freqs)
    assert ours[0].is_contiguous()
    upstream = results(UPSTREAM, t, grad, freqs)
    assert all(torch.equal(*pair) for pair in zip(ours, upstream, strict=True))


def test_angles_that_are_learned_get_upstreams_gradient() -> None:
    t, grad, freqs = case(torch.float32)
    freqs.requires_grad_()
    gradients = [
        torch.autograd.grad(function(t, freqs), freqs, grad)[0]
        for function in (in_fewer_passes(UPSTREAM), UPSTREAM)
    ]
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("flag", ["rotary_interleaved", "mla_rotary_interleaved"])
def test_other_forms_are_upstreams(flag: str) -> None:
    t, grad, freqs = case(torch.float32)
    ours = results(in_fewer_passes(UPSTREAM), t, grad, freqs, **{flag: True})
    upstream = results(UPSTREAM, t, grad, freqs, **{flag: True})
    assert all(torch.equal(*pair) for pair in zip(ours, upstream, strict=True))
    assert not torch.equal(ours[0], results(UPSTREAM, t, grad, freqs)[0])


def test_a_part_of_the_dimensions_is_upstreams() -> None:
    t, grad, freqs = case(torch.float32, rotated=8)
    ours = results(in_fewer_passes(UPSTREAM), t, grad, freqs)
    upstream = results(UPSTREAM, t, grad, freqs)
    assert all(torch.equal(*pair) for pair in zip(ours, upstream, strict=True))
    assert torch.equal(ours[0][..., 8:], t[..., 8:])


def test_gradcheck() -> None:
    t = torch.randn(3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, angle.cos(), angle.sin()), t)
