"""Memory of a GPU during training: weights, gradients and optimizer counted, the rest estimated."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from megatron_tst.preflight.activations import (
    depth_bytes,
    fp8_bytes,
    layer_bytes,
    micro_batches_in_flight,
)
from megatron_tst.preflight.rank_simulation import Stage, gradient_buffers
from megatron_tst.settings.losses import losses_of_run
from megatron_tst.settings.phases import Phase

GIB = 1 << 30
ALLOWANCE_BYTES = 6 * GIB
"""For what no formula here covers: CUDA and NCCL, workspaces of kernels, fragmentation."""

_LAYER_WEIGHT = re.compile(
    r"\blayers\.(\d+)\..*(linear_(qkv|q_proj|q_up_proj|kv_up_proj|proj|fc1|fc2)|eh_proj)\.weight\d*$"
)
_MULTI_TOKEN = re.compile(r"\bmtp\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Logits of a block of --tst-loss-impl linear, on a GPU.
_BLOCK_LOGITS = 1 << 27


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


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU at the peak of a step.

    Attributes:
        weights: with FP8 copies.
        gradients: buffer of main gradients.
        optimizer: main weights and moments.
        activations: kept for the backward, an estimate.
        logits: output layer and loss, an estimate; 0 but on the last stage.
        inputs: token bags and their mean, an estimate; 0 but on the first stage, and on the one
            with multi-token prediction.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    inputs: float

    @property
    def total(self) -> float:
        """Everything, and the allowance."""
        counted = self.weights + self.gradients + self.optimizer
        return counted + self.activations + self.logits + self.inputs + ALLOWANCE_BYTES


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


def weight_bytes(args: argparse.Namespace, parameters: RankParameters) -> float:
    """Bytes of the weights and of their FP8 copies, by row and by column."""
    element = 2 if args.bf16 or args.fp16 else 4
    if not parameters.fp8_weights:
        return element * parameters.kept
    copies = 2 * fp8_bytes(args) * parameters.fp8_weights
    if args.fp8_param_gather:
        return element * (parameters.kept - parameters.fp8_weights) + copies
    return element * parameters.kept + copies


def gradient_bytes(args: argparse.Namespace, parameters: RankParameters) -> float:
    """Bytes of the buffer in which gradients are accumulated and reduced."""
    is_fp32 = _adds_in_fp32(args) or not (args.bf16 or args.fp16)
    return (4 if is_fp32 else 2) * parameters.buffer


def _adds_in_fp32(args: argparse.Namespace) -> bool:
    # FSDP2 adds in the dtype of the weights.
    return bool(args.accumulate_allreduce_grads_in_fp32 and not args.use_torch_fsdp2)


def optimizer_bytes(args: argparse.Namespace, parameters: RankParameters) -> float:
    """Bytes of main weights and moments (Adam), at the data types that the arguments ask for."""
    if args.use_precision_aware_optimizer:
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
        main = args.main_params_dtype.itemsize
        if main == 4 and args.bf16 and not (args.fp8 and args.fp8_recipe != "delayed"):
            # The upper half of a main weight is the bf16 weight.
            main = 2
        return (main + moments) * parameters.shard
    # Weights in fp32 are their own main weights.
    main = 4 if args.bf16 or args.fp16 else 0
    copy = 4 if args.bf16 and not _adds_in_fp32(args) else 0
    return (main + 8 + copy) * parameters.shard


def phase_memory(
    args: argparse.Namespace,
    stage: Stage,
    parameters: RankParameters,
    phase: Phase,
    batch: int,
) -> Memory:
    """Memory of a rank in a phase.

    Args:
        args: validated command line.
        stage: what the rank holds.
        parameters: of the rank.
        phase: of the run.
        batch: sequences a step.
    """
    positions = args.micro_batch_size * args.seq_length // args.context_parallel_size
    count = max(batch // (args.micro_batch_size * args.data_parallel_size), 1)
    in_flight = micro_batches_in_flight(args, stage.pipeline_rank, count)
    is_first = stage.pipeline_rank == 0
    is_last = stage.pipeline_rank == args.pipeline_model_parallel_size - 1
    is_ahead = any(multi_token_layers(args, chunk) for chunk in stage.chunks)
    return Memory(
        weights=weight_bytes(args, parameters),
        gradients=gradient_bytes(args, parameters),
        optimizer=optimizer_bytes(args, parameters),
        activations=positions * in_flight * _layers_bytes(args, stage)
        + _working_bytes(args, positions),
        logits=_logit_bytes(args, positions, phase) if is_last else 0.0,
        inputs=_input_bytes(args, positions, phase) if is_first or is_ahead else 0.0,
    )


def _layers_bytes(args: argparse.Namespace, stage: Stage) -> float:
    """For each latent position, over the layers of a stage."""
    ahead = sum(
        sum(
            sum(layer_bytes(args, hasattr(layer.mlp, "router"), bool(args.fp8)).values())
            for layer in getattr(depth.mtp_model_layer, "layers", [depth.mtp_model_layer])
            if hasattr(layer, "mlp")
        )
        + sum(depth_bytes(args).values())
        for chunk in stage.chunks
        for depth in multi_token_layers(args, chunk)
    )
    return ahead + sum(
        sum(
            layer_bytes(
                args,
                is_moe=hasattr(layer.mlp, "router"),
                is_fp8=not is_bf16_layer(args, layer.layer_number),
                attention=not isinstance(layer.self_attention, IdentityOp),
                mlp=not isinstance(layer.mlp, IdentityOp),
            ).values()
        )
        for chunk in stage.chunks
        for layer in decoder_layers(chunk)
        if hasattr(layer, "mlp")
    )


def _working_bytes(args: argparse.Namespace, positions: int) -> float:
    """What the backward of one layer holds at once: its activations, and as many gradients."""
    whole = argparse.Namespace(**{**vars(args), "recompute_granularity": None})
    is_moe = bool(args.num_experts)
    return 2 * positions * sum(layer_bytes(whole, is_moe, is_fp8=False).values())


def _logit_bytes(args: argparse.Namespace, positions: int, phase: Phase) -> float:
    rows = args.padded_vocab_size / args.tensor_model_parallel_size
    # Those of all depths are kept for the backward.
    logits = positions * rows * (1 + (args.mtp_num_layers or 0))
    if args.tst_loss_impl == "linear":
        # A block, and the gradients of the hidden states and the weight that its forward computes.
        return 2 * min(_BLOCK_LOGITS, logits) + 4 * (positions + rows) * args.hidden_size
    losses = losses_of_run(args, has_gpu=True)
    loss = losses["bags" if phase.predicts_bags else "plain"]
    # A kernel's gradient takes the place of the logits. Megatron's own loss and that of torch keep
    # fp32 numbers beside the logits, and then beside their gradient.
    return (2 if loss in ("triton", "host te") else 2 + 4) * logits


def _input_bytes(args: argparse.Namespace, positions: int, phase: Phase) -> float:
    """Token and label ids as int64, and the embedding with its fp32 sum."""
    embedding = (2 + 4 if phase.is_superposed else 2) * args.hidden_size
    return positions * (2 * 8 * phase.bag_size + embedding)


def checkpoint_bytes(args: argparse.Namespace, total_parameters: int) -> float:
    """Bytes of a checkpoint with its optimizer: weights, fp32 main weights and moments.

    Main weights and moments are stored in fp32, whatever data type a precision-aware optimizer
    keeps.
    """
    weights = 2 if args.bf16 or args.fp16 else 4
    state = 0 if args.no_save_optim else 12
    return (weights + state) * total_parameters
