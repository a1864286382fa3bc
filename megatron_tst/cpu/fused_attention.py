"""Causal attention from matrix products and the kernels between them, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tst.cpu.causal_attention import QUERY_BLOCK
from megatron_tst.native import Kernels

# Probabilities of one layer that are kept for the backward pass; more are computed again.
_MOST_KEPT = 1 << 24


class Block(NamedTuple):
    """Some positions of the queries.

    Attributes:
        rows: their rows, ``heads`` a position.
        first: their first position.
        seen: the keys that the last of them sees.
    """

    rows: slice
    first: int
    seen: int


def blocks(length: int, heads: int) -> Iterator[Block]:
    """Cuts ``length`` positions into blocks, whose queries need no keys behind them."""
    for first in range(0, length, QUERY_BLOCK):
        stop = min(first + QUERY_BLOCK, length)
        yield Block(slice(first * heads, stop * heads), first, stop)


def attend(
    kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Attends to keys up to the own position.

    Scores and probabilities have the dtype of the operands, as in upstream's unfused attention.

    Args:
        kernels: what is compiled.
        query: [n, l heads, d]; the heads of a position lie side by side.
        key: [n, l, d].
        value: [n, l, d].
        scale: factor of the scores.

    Returns:
        [n, l heads, d], and the probabilities of each block; none if they are too many.
    """
    length = key.shape[1]
    heads = query.shape[1] // length
    context = torch.empty_like(query)
    keeps = query.shape[0] * query.shape[1] * length <= _MOST_KEPT
    kept = []
    for block in blocks(length, heads):
        probabilities = _probabilities(kernels, query, key, block, heads, scale)
        context[:, block.rows] = probabilities @ value[:, : block.seen]
        if keeps:
            kept.append(probabilities)
    return context, kept


def attention_gradients(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: list[Tensor],
    grad: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of key and value add up over blocks in float32."""
    length = key.shape[1]
    heads = query.shape[1] // length
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
    for index, block in enumerate(blocks(length, heads)):
        seen = slice(0, block.seen)
        if kept:
            probabilities = kept[index]
        else:
            probabilities = _probabilities(kernels, query, key, block, heads, scale)
        of_block = grad[:, block.rows]
        grad_scores = of_block @ value[:, seen].transpose(1, 2)
        kernels.causal_softmax_gradient_(probabilities, grad_scores, block.first, heads, scale)
        grad_value[:, seen] += probabilities.transpose(1, 2) @ of_block
        grad_key[:, seen] += grad_scores.transpose(1, 2) @ query[:, block.rows]
        grad_query[:, block.rows] = grad_scores @ key[:, seen]
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _probabilities(
    kernels: Kernels, query: Tensor, key: Tensor, block: Block, heads: int, scale: float
) -> Tensor:
    scores = query[:, block.rows] @ key[:, : block.seen].transpose(1, 2)
    return kernels.causal_softmax_(scores, block.first, heads, scale)
