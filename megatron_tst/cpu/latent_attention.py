"""Multi-latent attention of tensor-parallel ranks for the CPU: the whole gradient of its keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor


def with_whole_keys(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``MLASelfAttention._qkv_down_projection`` for local modules.

    The rotated part of a key serves the heads of all ranks. Upstream gathers the columns of a local
    projection by an operation whose backward takes each rank's own gradient for the sum of all
    (Megatron-LM issue 1699). Cut along the sequence, as Transformer Engine's projection leaves it,
    upstream gathers it by one that adds them up.
    """

    @functools.wraps(upstream)
    def down_projection(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[l/tp, b, h] -> latent queries and keys, [l/tp, b, width] under sequence parallelism."""
        queries, keys = upstream(self, hidden_states)
        width = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        if keys.shape[-1] != width and self.config.sequence_parallel:
            keys = gather_from_tensor_model_parallel_region(keys, group=self.tp_group)
            keys = scatter_to_sequence_parallel_region(keys, group=self.tp_group)
        return queries, keys

    return down_projection
