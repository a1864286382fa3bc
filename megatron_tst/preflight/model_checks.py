"""What the vocabulary and the built model show: rows, products in FP8, empty stages."""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron_tst.preflight.engine import has_transformer_engine
from megatron_tst.preflight.findings import Finding, error, warning
from megatron_tst.preflight.rank_parameters import decoder_layers, is_fp8_weight, is_layer_product
from megatron_tst.preflight.rank_simulation import Stage
from megatron_tst.settings.fully_sharded import uneven_shards

# Multiples that the dimensions of a matrix product in FP8 must be of, by --fp8-recipe.
_ALIGNMENT = {"mxfp8": 32, "blockwise": 128}
_OTHER_ALIGNMENT = 16
_OP_FUSER_ALIGNMENT = 256
# Mamba, gated delta net and sparse attention, in --hybrid-layer-pattern.
_ENGINE_LAYERS = "MGD"
_VOCABULARY_ALIGNMENT = 64


def vocabulary_misfits(args: argparse.Namespace, tokenizer_ids: int) -> list[Finding]:
    """Whether the rows of the embedding fit the tokenizer and the kernels.

    Args:
        args: validated, with ``padded_vocab_size``.
        tokenizer_ids: of the tokenizer.
    """
    rows = args.padded_vocab_size
    tensor = args.tensor_model_parallel_size
    found = []
    if rows < tokenizer_ids:
        found.append(
            error(
                f"--padded-vocab-size {rows} is below the {tokenizer_ids} ids of the tokenizer: "
                "raise or remove it."
            )
        )
    if rows % tensor:
        found.append(
            error(
                f"--padded-vocab-size {rows} is not a multiple of --tensor-model-parallel-size "
                f"{tensor}: raise it."
            )
        )
    elif rows // tensor % _VOCABULARY_ALIGNMENT:
        found.append(
            warning(
                f"the output layer of a GPU has {rows // tensor} rows, no multiple of "
                f"{_VOCABULARY_ALIGNMENT}: pass --padded-vocab-size "
                f"{-(-rows // (128 * tensor)) * 128 * tensor}."
            )
        )
    elif rows > tokenizer_ids:
        found.append(
            warning(
                f"the vocabulary of {tokenizer_ids} ids is padded to {rows} rows "
                "(--make-vocab-size-divisible-by, --padded-vocab-size): exports trim them. If the "
                "published size is another one, pass --padded-vocab-size."
            )
        )
    return found


def layer_products(args: argparse.Namespace, stage: Stage) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a rank's layers that take FP8, or would in bf16, by kind."""
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in stage.chunks:
        for name, parameter in chunk.named_parameters():
            if not is_layer_product(name, parameter):
                continue
            # All experts have one kind.
            if _kind(name) not in shapes and (
                not args.fp8 or is_fp8_weight(args, chunk, name, parameter)
            ):
                shapes[_kind(name)] = tuple(parameter.shape)
    return shapes


def fp8_multiple(recipe: str) -> int:
    """What both dimensions of a matrix product must be multiples of in FP8."""
    return _ALIGNMENT.get(recipe, _OTHER_ALIGNMENT)


def fp8_misalignments(args: argparse.Namespace, stage: Stage) -> list[Finding]:
    """Matrix products in FP8 whose dimensions on a GPU have no whole number of blocks.

    Args:
        args: validated command line.
        stage: the model of a rank.
    """
    if not args.fp8:
        return []
    multiple = fp8_multiple(args.fp8_recipe)
    if args.use_transformer_engine_op_fuser:
        multiple = _OP_FUSER_ALIGNMENT
    found = [
        error(
            f"--fp8-recipe {args.fp8_recipe}: {kind} is {rows} x {columns} on a GPU, and both must "
            f"be multiples of {multiple}: change the shape or --tensor-model-parallel-size, or "
            "use another recipe."
        )
        for kind, (rows, columns) in layer_products(args, stage).items()
        if rows % multiple or columns % multiple
    ]
    positions = positions_of_rank(args)
    if positions % multiple:
        found.append(
            error(
                f"--fp8-recipe {args.fp8_recipe}: a micro-batch has {positions} positions on a "
                f"GPU, no multiple of {multiple}: change --micro-batch-size or --seq-length."
            )
        )
    return found


def alignment(args: argparse.Namespace, stages: list[Stage]) -> int:
    """The largest power of two that divides all dimensions of the products of the layers."""
    sizes = [
        size for stage in stages for shape in layer_products(args, stage).values() for size in shape
    ]
    common = math.gcd(positions_of_rank(args), *sizes)
    return common & -common


def positions_of_rank(args: argparse.Namespace) -> int:
    """Latent positions of a micro-batch that a rank computes with."""
    return int(args.micro_batch_size * args.seq_length // args.context_parallel_size)


def _kind(name: str) -> str:
    part = "experts." if ".experts." in name else ""
    # Transformer Engine numbers the experts at the end: linear_fc1.weight7.
    return part + name.split(".")[-2]


def unbuildable(args: argparse.Namespace) -> list[Finding]:
    """What has no module of Megatron's own that could stand in for Transformer Engine's."""
    if has_transformer_engine():
        return []
    foreign = sorted(set(args.hybrid_layer_pattern or "") & set(_ENGINE_LAYERS))
    settings = {
        f"--experimental-attention-variant {args.experimental_attention_variant}": (
            args.experimental_attention_variant
        ),
        f"--moe-latent-size {args.moe_latent_size}": args.moe_latent_size,
        "--multi-latent-attention and --qk-layernorm without --q-lora-rank": (
            args.multi_latent_attention and args.qk_layernorm and args.q_lora_rank is None
        ),
        f"--hybrid-layer-pattern {args.hybrid_layer_pattern} ({' '.join(foreign)})": foreign,
    }
    return [not_built(setting) for setting, is_set in settings.items() if is_set]


def not_built(reason: str) -> Finding:
    """A model that this machine has not the modules for."""
    return warning(
        f"{reason}: the model is not built here, so that its parameters, FLOPs, memory and layout "
        "are not checked: run the preflight where Transformer Engine is (make setup-te)."
    )


def unmodelled(args: argparse.Namespace) -> list[Finding]:
    """What the estimates of memory and FLOPs do not know."""
    flags = {
        "--hybrid-layer-pattern": set(args.hybrid_layer_pattern or "") - set("*+-E|"),
        "--tensor-parallel-num-weight-shards": args.gtp_weight_remat_size > 1,
        "--expert-tensor-parallel-num-weight-shards": args.expert_gtp_weight_remat_size > 1,
        "--cpu-offloading-num-layers": args.cpu_offloading_num_layers,
        "--fine-grained-activation-offloading": args.fine_grained_activation_offloading,
        "--fp4-format": args.fp4,
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
    }
    found = [
        warning(f"{flag}: memory and FLOPs are estimated as without it.")
        for flag, value in flags.items()
        if value
    ]
    if args.optimizer != "adam":
        found.append(warning(f"--optimizer {args.optimizer}: its state is estimated as Adam's."))
    return found


def unequal_shards(args: argparse.Namespace, stages: list[Stage]) -> list[Finding]:
    """What FSDP2 cannot save; nothing without it."""
    messages = [
        uneven_shards(
            (
                (name.removeprefix("module."), parameter.shape)
                for name, parameter in stage.parameters()
            ),
            stage.data_parallel_size,
            args.swiglu,
        )
        for stage in stages
        if args.use_torch_fsdp2 and args.save
    ]
    return [error(message) for message in messages if message is not None]


def empty_stages(stages: list[Stage]) -> list[Finding]:
    """Pipeline stages without a layer, which cost a GPU each and compute next to nothing."""

    def layers(stage: Stage) -> list[Any]:
        return [layer for chunk in stage.chunks for layer in decoder_layers(chunk)]

    return [
        warning(f"pipeline stage {stage.pipeline_rank} has no layer of the decoder.")
        for stage in stages
        if not layers(stage)
    ]
