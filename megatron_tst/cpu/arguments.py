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
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "create_attention_mask_in_dataloader": False,
    # Reading a sample takes microseconds; loader processes would compete for the cores.
    "num_workers": 0,
}

_REFUSED = {
    "transformer_impl": ("--transformer-impl", "transformer_engine", "local"),
    "distributed_backend": ("--distributed-backend", "nccl", "gloo"),
}


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
    for name, (flag, value, remedy) in _REFUSED.items():
        if getattr(args, name) == value:
            raise ValueError(f"{flag} {value} needs a GPU and none is visible: use {remedy}.")
    if args.fp8 or getattr(args, "fp4", None):
        raise ValueError(
            "--fp8-format and --fp4-format need a GPU and none is visible: use --bf16."
        )
