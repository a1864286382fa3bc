"""Causal attention from matrix products and the kernels between them, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tst.cpu.causal_attention import QUERY_BLOCK
from megatron_tst.ops.native import Kernels

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
    contexts = []
    keeps = query.shape[0] * query.shape[1] * length <= _MOST_KEPT
    kept = []
    for block in blocks(length, heads):
        probabilities = _probabilities(kernels, query, key, block, heads, scale)
        contexts.append(torch.bmm(probabilities, value[:, : block.seen]))
        if keeps:
            kept.append(probabilities)
    return _joined(contexts), kept


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
    grad_queries = []
    grad_key, grad_value = _Total(key), _Total(value)
    for index, block in enumerate(blocks(length, heads)):
        if kept:
            probabilities = kept[index]
        else:
            probabilities = _probabilities(kernels, query, key, block, heads, scale)
        of_block, seen_key = grad[:, block.rows], key[:, : block.seen]
        grad_scores = torch.bmm(of_block, value[:, : block.seen].transpose(1, 2))
        kernels.causal_softmax_gradient_(probabilities, grad_scores, block.first, heads, scale)
        grad_value.add(torch.bmm(probabilities.transpose(1, 2), of_block))
        grad_key.add(torch.bmm(grad_scores.transpose(1, 2), query[:, block.rows]))
        grad_queries.append(torch.bmm(grad_scores, seen_key))
    return _joined(grad_queries), grad_key.rounded(), grad_value.rounded()


class _Total:
    """Sum of gradients of the first positions, in float32: [n, seen, d] -> [n, l, d].

    Args:
        like: what the gradients are of, [n, l, d].
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Adds [n, seen, d]."""
        if self._total is None and part.shape == self._like.shape:
            self._total = part  # The only one: the last block is the one that sees all.
            return
        if self._total is None:
            self._total = torch.zeros_like(self._like, dtype=torch.float32)
        self._total[:, : part.shape[1]] += part

    def rounded(self) -> Tensor:
        """[n, l, d]."""
        assert self._total is not None
        return self._total.to(self._like.dtype)


def _joined(blocks_of_rows: list[Tensor]) -> Tensor:
    return blocks_of_rows[0] if len(blocks_of_rows) == 1 else torch.cat(blocks_of_rows, 1)


def _probabilities(
    kernels: Kernels, query: Tensor, key: Tensor, block: Block, heads: int, scale: float
) -> Tensor:
    scores = torch.bmm(query[:, block.rows], key[:, : block.seen].transpose(1, 2))
    return kernels.causal_softmax_(scores, block.first, heads, scale)
