"""Parameters and FLOPs of a model whose pipeline stages were built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.planning.accounting import ModelSize
from megatron_tst.preflight.rank_simulation import Stage

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.", "output_layer."


@dataclass(frozen=True)
class BuiltModel:
    """A whole model, over all ranks.

    Attributes:
        total: parameters, each counted once.
        active: those that a token visits.
        embedding: rows of the input embedding, and of learned positions.
        output: of the output layer; 0 where it shares the embedding's.
    """

    total: int
    active: int
    embedding: int
    output: int

    @property
    def active_without_embeddings(self) -> int:
        """The count that names such as A1B use."""
        return self.active - self.embedding - self.output

    def size(self, args: argparse.Namespace) -> ModelSize:
        """What FLOPs follow from."""
        multiplied = self.active - (self.embedding if self.output else 0)
        return ModelSize(
            name="model",
            parameters=self.total,
            matmul_parameters=multiplied,
            layers=args.num_layers,
            attention_width=args.num_attention_heads * args.kv_channels,
        )


def whole_model(args: argparse.Namespace, stages: Sequence[Stage]) -> BuiltModel:
    """Adds up the parameters of one rank of every pipeline stage, times the ranks that share them.

    Args:
        args: validated command line.
        stages: one rank of each.
    """
    total = active = embedding = output = 0
    for stage in stages:
        for name, parameter in stage.parameters():
            # The last stage has a second copy of a tied embedding.
            if getattr(parameter, "shared", False):
                continue
            elements = parameter.numel() * _ranks_of(args, name, parameter)
            total += elements
            if ".experts." in name:
                active += elements * args.moe_router_topk // args.num_experts
                continue
            active += elements
            embedding += elements if _EMBEDDING in name or "position_embed" in name else 0
            output += elements if _OUTPUT in name else 0
    return BuiltModel(total, active, embedding, output)


def _ranks_of(args: argparse.Namespace, name: str, parameter: object) -> int:
    """Ranks that hold different parts of a parameter."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." in name:
        split = args.expert_tensor_parallel_size if is_split else 1
        return int(args.expert_model_parallel_size * split)
    return int(args.tensor_model_parallel_size) if is_split else 1
