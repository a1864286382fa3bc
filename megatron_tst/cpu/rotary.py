"""Rotary position embeddings for the CPU, in fewer passes than autograd's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_fewer_passes(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps ``_apply_rotary_pos_emb_bshd``, to the same bits, forward and gradient.

    Rotations of a part of the dimensions, of interleaved pairs, by angles that are learned, and
    what a later release asks for beyond these arguments are left to upstream.
    """

    @functools.wraps(upstream)
    def apply_rotary(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        asks_more = any(others) or any(named.values())
        interleaved = rotary_interleaved or mla_rotary_interleaved
        is_plain = freqs.dim() == t.dim() and freqs.shape[-1] == t.shape[-1]
        if asks_more or interleaved or not is_plain or freqs.requires_grad:
            ours = (rotary_interleaved, mla_rotary_interleaved, mscale)
            return upstream(t, freqs, *ours, *others, **named)
        cos = (torch.cos(freqs) * mscale).to(t.dtype)
        sin = (torch.sin(freqs) * mscale).to(t.dtype)
        result: Tensor = Rotation.apply(t, cos, sin)
        return result

    return apply_rotary


class Rotation(torch.autograd.Function):
    """``t * cos + (-t2, t1) * sin`` for the halves t1 and t2 of the last dimension."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[l, b, heads, d], and [l, 1, 1, d] or what broadcasts -> [l, b, heads, d]."""
        first, second = sin.chunk(2, dim=-1)
        # The sign goes to the table, which is smaller.
        signed = torch.cat((-first, second), dim=-1)
        ctx.save_for_backward(cos, signed)
        return (t * cos).add_(_swap_halves(t).mul_(signed)).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[l, b, heads, d] -> [l, b, heads, d]."""
        cos, signed = ctx.saved_tensors
        return (grad * cos).add_(_swap_halves(grad * signed)), None, None


def _swap_halves(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
