"""Argument defaults that make a Megatron launch script run on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_tst.common.errors import UsageError

# Fused kernels, Transformer Engine and NCCL exist for GPUs only.
_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "create_attention_mask_in_dataloader": False,
    # The other one starts processes that know nothing of the CPU platform.
    "async_strategy": "mcore",
    # Reading a sample takes microseconds; loader processes would compete for the cores.
    "num_workers": 0,
}

# Argument, its flag, and the only value that works without a GPU.
_WITHOUT_GPU = (
    ("transformer_impl", "--transformer-impl", "local"),
    ("distributed_backend", "--distributed-backend", "gloo"),
    ("cuda_graph_impl", "--cuda-graph-impl", "none"),
    ("fp8", "--fp8-format", None),
    ("fp4", "--fp4-format", None),
    ("moe_grouped_gemm", "--moe-grouped-gemm", False),
    ("async_strategy", "--async-strategy", "mcore"),
    ("tp_comm_overlap", "--tp-comm-overlap", False),
    ("use_megatron_fsdp", "--use-megatron-fsdp", False),
    ("nccl_ub", "--use-nccl-ub", False),
    ("log_straggler", "--log-straggler", False),
    ("nvtx_ranges", "--nvtx-ranges", False),
    ("record_memory_history", "--record-memory-history", False),
    ("init_model_with_meta_device", "--init-model-with-meta-device", False),
    ("enable_cuda_graph", "--enable-cuda-graph", False),
    ("external_cuda_graph", "--external-cuda-graph", False),
    ("pipeline_model_parallel_comm_backend", "--pipeline-model-parallel-comm-backend", None),
    ("hierarchical_context_parallel_sizes", "--hierarchical-context-parallel-sizes", None),
    ("tensor_parallel_num_weight_shards", "--tensor-parallel-num-weight-shards", None),
    (
        "expert_tensor_parallel_num_weight_shards",
        "--expert-tensor-parallel-num-weight-shards",
        None,
    ),
    # Modules and kernels of Transformer Engine, DeepEP and Kitchen.
    ("experimental_attention_variant", "--experimental-attention-variant", None),
    ("mla_down_proj_fusion", "--mla-down-proj-fusion", False),
    ("use_kitchen_attention", "--use-kitchen-attention", False),
    ("layernorm_zero_centered_gamma", "--apply-layernorm-1p", False),
    ("fused_residual_rmsnorm", "--fused-residual-rmsnorm", False),
    ("use_te_activation_func", "--use-te-activation-func", False),
    ("use_transformer_engine_op_fuser", "--use-transformer-engine-op-fuser", False),
    ("use_fused_weighted_squared_relu", "--use-fused-weighted-squared-relu", False),
    ("use_grouped_gemm_for_dense_mlp", "--use-grouped-gemm-for-dense-mlp", False),
    ("use_grouped_gemm_for_shared_expert", "--use-grouped-gemm-for-shared-expert", False),
    ("moe_latent_size", "--moe-latent-size", None),
    ("moe_mlp_glu_interleave_size", "--moe-mlp-glu-interleave-size", None),
    ("moe_shared_expert_glu_interleave_size", "--moe-shared-expert-glu-interleave-size", None),
    ("moe_permute_fusion", "--moe-permute-fusion", False),
    ("moe_router_fusion", "--moe-router-fusion", False),
    ("moe_enable_deepep", "--moe-enable-deepep", False),
    ("symmetric_ar_type", "--symmetric-ar-type", None),
    # To a CPU, from a GPU.
    ("cpu_offloading_num_layers", "--cpu-offloading-num-layers", 0),
    ("fine_grained_activation_offloading", "--fine-grained-activation-offloading", False),
    ("optimizer_cpu_offload", "--optimizer-cpu-offload", False),
)

# Layers, and the marks between pipeline stages and before multi-token prediction.
_HYBRID_LAYERS = "*+-E|/"


def set_cpu_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Changes defaults of Megatron's parser; what the user passes still wins.

    Raises:
        RuntimeError: the parser has no such argument.
    """
    known = {action.dest for action in parser._actions}
    for name in _DEFAULTS:
        if name not in known:
            raise RuntimeError(
                f"The CPU platform sets the Megatron argument {name!r}, which this Megatron-Core "
                "does not have: install the version pinned in pyproject.toml."
            )
    parser.set_defaults(**_DEFAULTS)
    return parser


def unfused_attention(settings: Any) -> list[str]:
    """Flags of what the platform leaves to Megatron's unfused attention.

    Args:
        settings: a command line or a ``TransformerConfig``.
    """
    flags = {
        "--window-size": settings.window_size is not None,
        "--softmax-type": settings.softmax_type != "vanilla",
        "--apply-query-key-layer-scaling": settings.apply_query_key_layer_scaling,
    }
    return [flag for flag, is_set in flags.items() if is_set]


def refuse_gpu_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that only work on a GPU.

    Raises:
        UsageError: naming the argument, its value and the remedy.
    """
    for name, flag, value in _WITHOUT_GPU:
        given = getattr(args, name)
        if given != value:
            named = flag if given is True else f"{flag} {given}"
            remedy = f"use {value}" if value else "remove it"
            raise UsageError(f"{named} needs a GPU and none is visible: {remedy}.")
    if args.moe_token_dispatcher_type == "flex":
        raise UsageError(
            "--moe-token-dispatcher-type flex needs a GPU and none is visible: use alltoall."
        )
    _refuse_attention(args)
    if args.tst_loss_impl == "triton":
        raise UsageError("--tst-loss-impl triton needs a GPU and none is visible: use auto.")
    if args.profile and not args.use_pytorch_profiler:
        raise UsageError(
            "--profile starts a GPU profiler and no GPU is visible: add --use-pytorch-profiler."
        )
    foreign = set(args.hybrid_layer_pattern or "") - set(_HYBRID_LAYERS)
    if foreign:
        raise UsageError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} has layers that need a GPU "
            f"({' '.join(sorted(foreign))}) and none is visible: use attention (*, latent: +), MLP "
            "(-) and mixture of experts (E)."
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise UsageError(
            "--reset-attention-mask needs attention masks, which the data loader does not create "
            "on the CPU platform: remove it."
        )


def _refuse_attention(args: argparse.Namespace) -> None:
    if args.multi_latent_attention and args.qk_layernorm and args.q_lora_rank is None:
        raise UsageError(
            "--qk-layernorm with --multi-latent-attention needs --q-lora-rank where no GPU is "
            "visible: pass it, or remove --qk-layernorm."
        )
    unfused = unfused_attention(args)
    if not unfused:
        return
    others = {
        f"--context-parallel-size {args.context_parallel_size}": args.context_parallel_size > 1,
        "--multi-latent-attention": args.multi_latent_attention
        or "+" in (args.hybrid_layer_pattern or ""),
        "--dataloader-inter-document-masking": args.dataloader_inter_document_masking,
    }
    for other, is_set in others.items():
        if is_set:
            raise UsageError(
                f"{unfused[0]} with {other} needs a GPU and none is visible: remove one of them."
            )
