"""Core attention for the CPU: torch's fused attention behind Megatron's interface."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_tst.common.errors import UsageError
from megatron_tst.cpu.arguments import unfused_attention
from megatron_tst.cpu.causal_attention import CausalAttention
from megatron_tst.cpu.context_parallel import attend_from_chunks, gather_keys_and_values


class CoreAttention:
    """Builds the core attention that computes what a configuration asks for.

    A class, because Megatron builds modules from classes only.
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **arguments: Any,
    ) -> FusedCoreAttention | DotProductAttention:
        """Upstream's module for settings that the fused one does not compute.

        Args:
            config: of the model.
            layer_number: from 1.
            attn_mask_type: of the layer.
            attention_type: self or cross.
            **arguments: others of a core attention.

        Raises:
            UsageError: a setting that neither computes.
        """
        unfused = unfused_attention(config)
        if not unfused:
            return FusedCoreAttention(
                config, layer_number, attn_mask_type, attention_type, **arguments
            )
        if config.context_parallel_size > 1:
            raise UsageError(
                f"{unfused[0]} is set, which attention on the CPU platform does not compute "
                "under --context-parallel-size: set it to 1, or run on a GPU."
            )
        if "k_channels" in arguments:
            raise UsageError(
                f"{unfused[0]} is set, which attention on the CPU platform does not compute "
                "with --multi-latent-attention: remove one of them, or run on a GPU."
            )
        return DotProductAttention(
            config, layer_number, attn_mask_type, attention_type, **arguments
        )


class FusedCoreAttention(MegatronModule):
    """Causal or masked attention over all heads of this tensor-parallel rank.

    Upstream's unfused ``DotProductAttention`` materialises the [b, heads, l, l] scores in several
    dtypes, which dominates small models on a CPU.

    Under context parallelism every rank gathers the keys and values of the whole sequence, whatever
    ``--cp-comm-type`` says: its choices move the same numbers in different ways.

    Values may have another width than queries and keys, as in multi-latent attention.

    Raises:
        UsageError: dropout under context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.cp_group = None
        if config.context_parallel_size > 1:
            _require_no_dropout(self.dropout)
            self.cp_group = _context_parallel_group(pg_collection)

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
            query: [l/cp, b, heads, head_dim], local to this tensor- and context-parallel rank.
            key: [l/cp, b, groups, head_dim].
            value: [l/cp, b, groups, head_dim].
            attention_mask: [b or 1, 1, l, l], True where attention is forbidden. It replaces the
                causal mask, as in upstream's ``DotProductAttention``. Not supported under context
                parallelism.
            attn_mask_type: overrides the layer's mask type.
            attention_bias: not supported.
            packed_seq_params: documents of a packed sequence: query, key and value have no
                dimension of the batch, and each document is attended to by itself alone, causally.
                Not supported under context parallelism.

        Returns:
            [l/cp, b, heads * head_dim]; of a packed sequence [l, 1, heads * head_dim].

            Collectives: one all-gather within the context-parallel group; one reduce-scatter in
            the backward pass.

        Raises:
            UsageError: an argument that is not supported, or causal attention of queries to a
                different number of keys.
        """
        _require_absent(attention_bias=attention_bias)
        if packed_seq_params is not None:
            _require_absent(attention_mask=attention_mask)
            return self._attend_within_documents(query, key, value, packed_seq_params)
        mask_type = attn_mask_type or self.attn_mask_type
        is_causal = attention_mask is None and mask_type == AttnMaskType.causal
        if is_causal:
            _require_one_sequence(query, key)
        if self.cp_group is not None:
            if not is_causal:
                raise UsageError(
                    "attention_mask or a mask type other than causal is given, which attention on "
                    "the CPU platform does not compute under --context-parallel-size: set it to 1."
                )
            key, value = gather_keys_and_values(key, value, self.cp_group)
        # After the gather, so that no copy is sent.
        group_size = query.shape[2] // key.shape[2]
        if group_size > 1:
            key = key.repeat_interleave(group_size, dim=2)
            value = value.repeat_interleave(group_size, dim=2)
        # [l, b, heads, head_dim] -> [b, heads, l, head_dim]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if self.cp_group is not None:
            context = attend_from_chunks(query, key, value, self.softmax_scale, self.cp_group)
        elif is_causal and dropout == 0.0:
            context = CausalAttention.apply(query, key, value, self.softmax_scale)
        else:
            mask = None if attention_mask is None else ~attention_mask
            with self._dropout_randomness():
                context = scaled_dot_product_attention(
                    query, key, value, mask, dropout, is_causal, scale=self.softmax_scale
                )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_within_documents(
        self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams
    ) -> Tensor:
        if self.cp_group is not None:
            raise UsageError(
                "Attention within documents is not computed under --context-parallel-size on the "
                "CPU platform: set it to 1."
            )
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        queries, keys, values = (x.unsqueeze(1).split(lengths) for x in (query, key, value))
        documents = zip(queries, keys, values, strict=True)
        return torch.cat(
            [self.forward(q, k, v, None, AttnMaskType.causal) for q, k, v in documents]
        )

    def _dropout_randomness(self) -> AbstractContextManager[None]:
        # Tensor-parallel ranks hold different heads, which must drop different weights. Under
        # sequence parallelism the caller has already chosen the generator.
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork


def _require_absent(**arguments: object) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise UsageError(
                f"{name} is given, which attention on the CPU platform does not compute: "
                "remove the option that asks for it, or run on a GPU."
            )


def _require_one_sequence(query: Tensor, key: Tensor) -> None:
    if query.shape[0] != key.shape[0]:
        raise UsageError(
            f"Causal attention of {query.shape[0]} queries to {key.shape[0]} keys: the CPU "
            "platform computes it within one sequence only, without a cache of keys."
        )


def _context_parallel_group(pg_collection: Any) -> dist.ProcessGroup:
    if pg_collection is None:
        return parallel_state.get_context_parallel_group()
    return pg_collection.cp


def _require_no_dropout(attention_dropout: float) -> None:
    if attention_dropout > 0.0:
        raise UsageError(
            f"--attention-dropout is {attention_dropout}, which attention on the CPU platform does "
            "not compute under --context-parallel-size: set it to 0, or run on a GPU."
        )
