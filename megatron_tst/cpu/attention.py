"""Core attention for the CPU: torch's fused attention behind Megatron's interface."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 128
"""Queries that the backward pass handles at a time; their scores stay in the cache."""


class CausalAttention(torch.autograd.Function):
    """Causal attention with torch's fused forward and a blocked backward.

    torch's fused backward on CPUs takes 5 to 17 times as long as its forward at the lengths of
    small models; batched matrix products over a block of queries take 2 to 3 times.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attends; query, key, value and the result are [b, heads, l, head_dim]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Recomputes the probabilities of a block of queries at a time.

        Gradients of keys and values add up over the blocks in at least float32.
        """
        batch_and_heads = ctx.saved_tensors[0].shape[:2]
        query, key, value, grad = (x.flatten(0, 1) for x in (*ctx.saved_tensors, grad_context))
        grad_query = torch.empty_like(query)
        sum_dtype = torch.promote_types(key.dtype, torch.float32)
        grad_key = torch.zeros(key.shape, dtype=sum_dtype)
        grad_value = torch.zeros(value.shape, dtype=sum_dtype)
        for start in range(0, query.shape[1], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, query.shape[1])
            rows, seen = slice(start, stop), slice(0, stop)
            probabilities = _causal_probabilities(query[:, rows], key[:, seen], ctx.scale, start)
            grad_value[:, seen] += probabilities.transpose(1, 2) @ grad[:, rows]
            grad_probabilities = grad[:, rows] @ value[:, seen].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, query.dtype
            ).mul_(ctx.scale)
            grad_query[:, rows] = grad_scores @ key[:, seen]
            grad_key[:, seen] += grad_scores.transpose(1, 2) @ query[:, rows]
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        in_query, in_key, in_value = (g.unflatten(0, batch_and_heads) for g in grads)
        return in_query, in_key, in_value, None


def _causal_probabilities(query: Tensor, key: Tensor, scale: float, first_position: int) -> Tensor:
    """Attention probabilities [n, q, k] of queries that start at ``first_position``."""
    forbidden = torch.full((query.shape[1], key.shape[1]), -torch.inf, dtype=query.dtype)
    forbidden.triu_(first_position + 1)
    scores = torch.baddbmm(forbidden, query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1)


class FusedCoreAttention(MegatronModule):
    """Causal or masked attention over all heads of this tensor-parallel rank.

    Upstream's unfused ``DotProductAttention`` materialises the [b, heads, l, l] scores in several
    dtypes, which dominates small models on a CPU.

    Raises:
        ValueError: a setting that it does not compute: context parallelism, softmax variants,
            sliding windows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        _require_supported(config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            query: [l, b, heads, head_dim], local to this tensor-parallel rank.
            key: [l, b, groups, head_dim].
            value: [l, b, groups, head_dim].
            attention_mask: [b or 1, 1, l, l], True where attention is forbidden. It replaces the
                causal mask, as in upstream's ``DotProductAttention``.
            attn_mask_type: overrides the layer's mask type.
            attention_bias: not supported.
            packed_seq_params: not supported.

        Returns:
            [l, b, heads * head_dim].

        Raises:
            ValueError: an argument that is not supported, or causal attention of queries to a
                different number of keys.
        """
        for name, unsupported in (
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if unsupported is not None:
                raise ValueError(
                    f"{name} is given, which attention on the CPU platform does not compute: "
                    "remove the option that asks for it, or run on a GPU."
                )
        group_size = query.shape[2] // key.shape[2]
        if group_size > 1:
            key = key.repeat_interleave(group_size, dim=2)
            value = value.repeat_interleave(group_size, dim=2)
        # [l, b, heads, head_dim] -> [b, heads, l, head_dim]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        mask_type = attn_mask_type or self.attn_mask_type
        is_causal = attention_mask is None and mask_type == AttnMaskType.causal
        if is_causal and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"Causal attention of {query.shape[2]} queries to {key.shape[2]} keys: the CPU "
                "platform computes it within one sequence only, without a cache of keys."
            )
        if is_causal and dropout == 0.0:
            context = CausalAttention.apply(query, key, value, self.softmax_scale)
        else:
            mask = None if attention_mask is None else ~attention_mask
            with self._dropout_randomness():
                context = scaled_dot_product_attention(
                    query, key, value, mask, dropout, is_causal, scale=self.softmax_scale
                )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _dropout_randomness(self) -> AbstractContextManager[None]:
        # Tensor-parallel ranks hold different heads, which must drop different weights. Under
        # sequence parallelism the caller has already chosen the generator.
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork


def _require_supported(config: TransformerConfig) -> None:
    refused = {
        "--context-parallel-size": config.context_parallel_size > 1,
        "--window-size": config.window_size is not None,
        "--softmax-type": config.softmax_type != "vanilla",
        "--apply-query-key-layer-scaling": config.apply_query_key_layer_scaling,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{flag} is set, which attention on the CPU platform does not compute: remove it, "
                "or run on a GPU."
            )
