"""Parameters and FLOPs of a model whose pipeline stages were built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.planning.accounting import ModelSize
from megatron_tst.preflight.rank_parameters import is_multi_token
from megatron_tst.preflight.rank_simulation import Stage
from megatron_tst.settings.attention_layers import ATTENTION, windows

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.", "output_layer."


@dataclass(frozen=True)
class BuiltModel:
    """A whole model, over all ranks.

    Attributes:
        total: parameters, each counted once.
        active: those that a token visits.
        embedding: rows of the input embedding, and of learned positions.
        output: of the output layer; 0 where it shares the embedding's.
        multi_token: active ones of the layers of multi-token prediction.
    """

    total: int
    active: int
    embedding: int
    output: int
    multi_token: int

    @property
    def active_without_embeddings(self) -> int:
        """The count that names such as A1B use."""
        return self.active - self.embedding - self.output - self.multi_token

    def size(self, args: argparse.Namespace) -> ModelSize:
        """What FLOPs follow from."""
        depths = args.mtp_num_layers or 0
        # The output layer follows each depth, and one layer may serve all of them.
        passes = depths if args.mtp_use_repeated_layer else min(depths, 1)
        layers = [_left_of(window) for window in windows(args)]
        multiplied = self.active - (self.embedding if self.output else 0)
        multiplied += depths * (self.output or self.embedding)
        multiplied += max(passes - 1, 0) * self.multi_token
        return ModelSize(
            name="model",
            parameters=self.total,
            matmul_parameters=multiplied,
            layers=layers.count(None) + _attention_ahead(args),
            attention_width=_attention_width(args),
            windows=tuple(left + 1 for left in layers if left is not None),
        )


def _left_of(window: tuple[int, int] | None) -> int | None:
    """Positions before its own that a layer sees, None for all."""
    return window[0] if window and window[0] >= 0 else None


def _attention_ahead(args: argparse.Namespace) -> int:
    """Layers with attention of multi-token prediction, over all depths."""
    if args.hybrid_layer_pattern:
        ahead = args.hybrid_layer_pattern.partition("/")[2]
        return sum(kind in ATTENTION for kind in ahead)
    return args.mtp_num_layers or 0


def _attention_width(args: argparse.Namespace) -> float:
    """Of all heads; latent attention has values of another width than keys."""
    if args.multi_latent_attention:
        keys = args.qk_head_dim + args.qk_pos_emb_head_dim
        return float(args.num_attention_heads * (keys + args.v_head_dim) / 2)
    return float(args.num_attention_heads * args.kv_channels)


def whole_model(args: argparse.Namespace, stages: Sequence[Stage]) -> BuiltModel:
    """Adds up the parameters of one rank of every pipeline stage, times the ranks that share them.

    Args:
        args: validated command line.
        stages: one rank of each.
    """
    total = active = embedding = output = multi_token = 0
    for stage in stages:
        for name, parameter in stage.parameters():
            # The last stage has a second copy of a tied embedding.
            if getattr(parameter, "shared", False):
                continue
            elements = parameter.numel() * _ranks_of(args, name, parameter)
            total += elements
            visited = elements
            if ".experts." in name:
                visited = elements * args.moe_router_topk // args.num_experts
            active += visited
            multi_token += visited if is_multi_token(name) else 0
            embedding += elements if _EMBEDDING in name or "position_embed" in name else 0
            output += elements if _OUTPUT in name else 0
    return BuiltModel(total, active, embedding, output, multi_token)


def _ranks_of(args: argparse.Namespace, name: str, parameter: object) -> int:
    """Ranks that hold different parts of a parameter."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." in name:
        split = args.expert_tensor_parallel_size if is_split else 1
        return int(args.expert_model_parallel_size * split)
    return int(args.tensor_model_parallel_size) if is_split else 1
