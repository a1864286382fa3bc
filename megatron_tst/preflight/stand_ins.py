"""Modules whose parameters count and which compute nothing, in place of those of a GPU.

Megatron's own local modules, and those of the CPU platform, refuse settings that Transformer Engine
has: windows, widths of latent attention, context parallelism, other norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tst.upstream.patches import replaced


class PosedAttention(MegatronModule):
    """Core attention of any kind: its only parameters are those of a learned sink.

    Args:
        config: of the model.
        *args: others of a core attention.
        **kwargs: others of a core attention.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads))
            # Each rank has its heads'.
            vars(self.softmax_offset)["tensor_model_parallel"] = True


def _norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
) -> torch.nn.Module:
    norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    norm: torch.nn.Module = norms[config.normalization](hidden_size, eps=eps)
    return norm


@contextmanager
def stand_in_modules() -> Iterator[None]:
    """Megatron's specification of local layers takes these modules."""
    attention = "megatron.core.models.backends:LocalSpecProvider.core_attention"
    norm = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"
    with replaced(attention, lambda self: PosedAttention), replaced(norm, _norm):
        yield
