"""Argument defaults that make a Megatron launch script run on a CPU."""

from __future__ import annotations

import argparse

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
)

# Layers, and the marks between pipeline stages and before multi-token prediction.
_HYBRID_LAYERS = "*-E|/"


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


def refuse_gpu_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that only work on a GPU.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """
    for name, flag, value in _WITHOUT_GPU:
        given = getattr(args, name)
        if given != value:
            named = flag if given is True else f"{flag} {given}"
            remedy = f"use {value}" if value else "remove it"
            raise ValueError(f"{named} needs a GPU and none is visible: {remedy}.")
    if args.tst_loss_impl == "triton":
        raise ValueError("--tst-loss-impl triton needs a GPU and none is visible: use auto.")
    if args.profile and not args.use_pytorch_profiler:
        raise ValueError(
            "--profile starts a GPU profiler and no GPU is visible: add --use-pytorch-profiler."
        )
    foreign = set(args.hybrid_layer_pattern or "") - set(_HYBRID_LAYERS)
    if foreign:
        raise ValueError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} has layers that need a GPU "
            f"({' '.join(sorted(foreign))}) and none is visible: use attention (*), MLP (-) and "
            "mixture of experts (E)."
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise ValueError(
            "--reset-attention-mask needs attention masks, which the data loader does not create "
            "on the CPU platform: remove it."
        )
