"""What a rank of a launch holds: parameters, those in FP8, gradient buffers and shards, counted."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tst.preflight.rank_simulation import Stage, gradient_buffers

_LAYER_WEIGHT = re.compile(
    r"\blayers\.(\d+)\..*(linear_(qkv|q_proj|q_up_proj|kv_up_proj|proj|fc1|fc2)|eh_proj)\.weight\d*$"
)
_MULTI_TOKEN = re.compile(r"\bmtp\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class RankParameters:
    """What a rank holds, in elements.

    Attributes:
        weights: all parameters.
        kept: those in memory at the peak of a step.
        fp8_weights: those kept or copied in FP8.
        buffer: of gradients, with the padding that the distributed optimizer needs.
        shard: parameters that the rank's optimizer updates.
    """

    weights: int
    kept: int
    fp8_weights: int
    buffer: int
    shard: int


def rank_parameters(args: argparse.Namespace, stage: Stage) -> RankParameters:
    """Counts what a rank holds.

    Exact for the model that was built: buffers and shards come from Megatron's own layout. The
    experts of Transformer Engine lie in another order than those of the local specification,
    which moves some padding.
    """
    named = stage.parameters()
    weights = sum(parameter.numel() for _, parameter in named)
    fp8 = sum(
        parameter.numel()
        for chunk in stage.chunks
        for name, parameter in chunk.named_parameters()
        if args.fp8 and is_fp8_weight(args, chunk, name, parameter)
    )
    if args.use_torch_fsdp2:
        return _fully_sharded(args, stage, weights, fp8)
    if not args.use_distributed_optimizer:
        return RankParameters(weights, weights, fp8, weights, weights)
    buffer = shard = 0
    for key, layout in gradient_buffers(args, stage):
        if key.is_expert_parallel:
            rank = stage.expert_data_parallel_rank
        else:
            rank = stage.data_parallel_rank
        buffer += layout.bucket_indices[-1][1]
        shard += _shard(layout, rank % layout.num_optimizer_shards)
    return RankParameters(weights, weights, fp8, buffer, shard)


def _fully_sharded(
    args: argparse.Namespace, stage: Stage, weights: int, fp8: int
) -> RankParameters:
    """A shard of everything, and what FSDP2 gathers at once: two layers, and what is in none.

    The second layer is the one that is gathered while the first computes; gradients are whole of
    one.
    """
    layers: Counter[str] = Counter()
    others = 0
    for name, parameter in stage.parameters():
        if match := _LAYER.search(name):
            layers[match.group(1)] += parameter.numel()
        elif "embedding." not in name:
            others += parameter.numel()
    shard = -(-weights // stage.data_parallel_size)
    largest = max(layers.values(), default=0)
    gathered = others + 2 * largest if args.torch_fsdp2_reshard_after_forward else weights
    return RankParameters(weights, shard + gathered, fp8, shard + others + largest, shard)


def _shard(layout: Any, rank: int) -> int:
    """Elements of parameters, without padding, in the part of every bucket that a rank owns."""
    elements = 0
    for begin, end, bucket in layout.param_index_map.values():
        first, last = layout.bucket_indices[bucket]
        width = (last - first) // layout.num_optimizer_shards
        own = first + rank * width
        elements += max(0, min(end, own + width) - max(begin, own))
    return elements


def is_fp8_weight(
    args: argparse.Namespace, chunk: torch.nn.Module, name: str, parameter: torch.Tensor
) -> bool:
    """Whether a parameter is the weight of a matrix product in FP8."""
    if not is_layer_product(name, parameter):
        return False
    if is_multi_token(name):
        # The first and the last layer of the decoder are the only ones in bf16.
        return bool(args.fp8)
    match = _LAYER_WEIGHT.search(name)
    assert match is not None
    layer = decoder_layers(chunk)[int(match.group(1))]
    return not is_bf16_layer(args, layer.layer_number)


def is_layer_product(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is the weight of a matrix product of a layer, without the router."""
    return parameter.ndim == 2 and _LAYER_WEIGHT.search(name) is not None


def is_multi_token(name: str) -> bool:
    """Whether a parameter belongs to the layers of multi-token prediction."""
    return _MULTI_TOKEN.search(name) is not None


def is_bf16_layer(args: argparse.Namespace, layer_number: int) -> bool:
    """Whether a layer, counted from 1 over all stages, has no FP8."""
    if not args.fp8:
        return True
    last = args.num_layers - args.num_layers_at_end_in_bf16
    return args.first_last_layers_bf16 and not (
        args.num_layers_at_start_in_bf16 < layer_number <= last
    )


def decoder_layers(chunk: torch.nn.Module) -> list[Any]:
    """The layers of a chunk of the model."""
    model: Any = getattr(chunk, "module", chunk)
    return list(model.decoder.layers)


def multi_token_layers(args: argparse.Namespace, chunk: torch.nn.Module) -> list[Any]:
    """The layers of multi-token prediction of a chunk, one for each depth."""
    model: Any = getattr(chunk, "module", chunk)
    if not hasattr(model, "mtp"):
        return []
    layers = list(model.mtp.layers)
    return layers * (args.mtp_num_layers // len(layers))
