"""Causal attention with a backward pass that suits CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 128
"""Queries that the backward pass handles at a time; their scores stay in the cache."""


class CausalAttention(torch.autograd.Function):
    """Causal attention with torch's fused forward and a blocked backward.

    The queries are those of the last positions of the keys: of all positions, or of a later part.

    torch's fused backward on CPUs takes 5 to 17 times as long as its forward at the lengths of
    small models; batched matrix products over a block of queries take 2 to 3 times.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attends.

        Args:
            ctx: of autograd.
            query: [b, heads, q, head_dim].
            key: [b, heads, l, head_dim] with l >= q.
            value: [b, heads, l, head_dim].
            scale: factor of the scores.

        Returns:
            [b, heads, q, head_dim].
        """
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        queries, keys = query.shape[2], key.shape[2]
        if queries == keys:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        # torch's causal mask would put the first query at the first key.
        seen = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
        return scaled_dot_product_attention(query, key, value, seen, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Recomputes the probabilities of a block of queries at a time.

        Gradients of keys and values add up over the blocks in at least float32.
        """
        batch_and_heads = ctx.saved_tensors[0].shape[:2]
        query, key, value, grad = (x.flatten(0, 1) for x in (*ctx.saved_tensors, grad_context))
        grad_query = torch.empty_like(query)
        first_position = key.shape[1] - query.shape[1]
        # The sums start with the last block, which sees every key.
        last = max(query.shape[1] - 1, 0) // QUERY_BLOCK * QUERY_BLOCK
        grad_query[:, last:], *sums = _block_gradients(
            query[:, last:], key, value, grad[:, last:], ctx.scale
        )
        sum_dtype = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (part.to(sum_dtype) for part in sums)
        for start in range(0, last, QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            seen = slice(0, first_position + rows.stop)
            grad_query[:, rows], to_key, to_value = _block_gradients(
                query[:, rows], key[:, seen], value[:, seen], grad[:, rows], ctx.scale
            )
            grad_key[:, seen] += to_key
            grad_value[:, seen] += to_value
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        in_query, in_key, in_value = (g.unflatten(0, batch_and_heads) for g in grads)
        return in_query, in_key, in_value, None


def _block_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values for queries at the last positions of the keys."""
    probabilities = _causal_probabilities(query, key, scale)
    grad_probabilities = grad @ value.transpose(1, 2)
    grad_scores = torch._softmax_backward_data(
        grad_probabilities, probabilities, -1, query.dtype
    ).mul_(scale)
    grad_key = grad_scores.transpose(1, 2) @ query
    return grad_scores @ key, grad_key, probabilities.transpose(1, 2) @ grad


def _causal_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention probabilities [n, q, l] of queries at the last q of l positions."""
    queries, keys = query.shape[1], key.shape[1]
    forbidden = torch.full((queries, keys), -torch.inf, dtype=query.dtype)
    forbidden.triu_(keys - queries + 1)
    scores = torch.baddbmm(forbidden, query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1)
