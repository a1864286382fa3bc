"""Memory of a GPU during training: weights, gradients and optimizer counted, the rest estimated."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from megatron_tst.preflight.activations import (
    depth_bytes,
    fp8_bytes,
    input_bytes,
    layer_bytes,
    micro_batches_in_flight,
)
from megatron_tst.preflight.rank_parameters import (
    RankParameters,
    decoder_layers,
    is_bf16_layer,
    multi_token_layers,
)
from megatron_tst.preflight.rank_simulation import Stage
from megatron_tst.preflight.recomputation import (
    kept_by_layers,
    rebuilt_at_once,
    recomputes_depths,
)
from megatron_tst.settings.losses import losses_of_run
from megatron_tst.settings.phases import Phase

GIB = 1 << 30
ALLOWANCE_BYTES = 6 * GIB
"""For what no formula here covers: CUDA and NCCL, workspaces of kernels, fragmentation."""

# Logits of a block of --tst-loss-impl linear, on a GPU.
_BLOCK_LOGITS = 1 << 27


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
        batch: sequences a step, at the most.
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
        + positions * _working_bytes(args, stage),
        logits=_logit_bytes(args, positions, phase) if is_last else 0.0,
        inputs=_input_bytes(args, positions, phase) if is_first or is_ahead else 0.0,
    )


def _layers_bytes(args: argparse.Namespace, stage: Stage) -> float:
    """For each latent position, over the layers of a stage."""
    hidden = input_bytes(args)
    return sum(
        kept_by_layers(args, _decoder_bytes(args, chunk), hidden)
        + sum(_depth_bytes(args, depth) for depth in multi_token_layers(args, chunk))
        for chunk in stage.chunks
    )


def _decoder_bytes(args: argparse.Namespace, chunk: torch.nn.Module) -> list[float]:
    """What each layer of a chunk keeps, without full recomputation."""
    return [
        _bytes_of(args, layer, is_fp8=not is_bf16_layer(args, layer.layer_number))
        for layer in decoder_layers(chunk)
    ]


def _bytes_of(args: argparse.Namespace, layer: Any, is_fp8: bool) -> float:
    if not hasattr(layer, "mlp"):
        # Of another kind, which nothing here counts.
        return 0.0
    kept = layer_bytes(
        args,
        is_moe=hasattr(layer.mlp, "router"),
        is_fp8=is_fp8,
        attention=not isinstance(layer.self_attention, IdentityOp),
        mlp=not isinstance(layer.mlp, IdentityOp),
    )
    return sum(kept.values())


def _depth_bytes(args: argparse.Namespace, depth: Any) -> float:
    """What a depth of multi-token prediction keeps."""
    hidden = input_bytes(args)
    if recomputes_depths(args):
        return sum(depth_bytes(args, is_recomputed=True).values()) + kept_by_layers(
            args, [0.0], hidden
        )
    around = sum(depth_bytes(args, is_recomputed=False).values())
    # A stack of a HybridModel recomputes its layers as the decoder does.
    stack = getattr(depth.mtp_model_layer, "layers", None)
    layers = [
        _bytes_of(args, layer, is_fp8=bool(args.fp8))
        for layer in (stack or [depth.mtp_model_layer])
    ]
    return around + (kept_by_layers(args, layers, hidden) if stack else sum(layers))


def _working_bytes(args: argparse.Namespace, stage: Stage) -> float:
    """What the backward holds at once for each position.

    The activations of a layer, or of the layers that are computed again together, and as many
    gradients as one layer has.
    """
    whole = argparse.Namespace(
        **{**vars(args), "recompute_granularity": None, "moe_layer_recompute": False}
    )
    layer = sum(layer_bytes(whole, bool(args.num_experts), is_fp8=False).values())
    rebuilt = (rebuilt_at_once(args, _decoder_bytes(args, chunk)) for chunk in stage.chunks)
    return layer + max(layer, *rebuilt)


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
