"""Says which fused kernels a run does without, where Transformer Engine or apex is missing."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from importlib.util import find_spec

from megatron.training import print_rank_0

from megatron_tst.common.errors import UsageError

_TRANSFORMER_ENGINE = "transformer_engine"
_APEX = "apex"
# The extension of apex that adds a weight gradient to the main gradients as it is computed.
_ACCUMULATION = "fused_weight_gradient_mlp_cuda"


def report_fused_paths(args: argparse.Namespace) -> None:
    """Prints on rank 0 which fused kernels the run does without.

    Args:
        args: validated command line of a run on GPUs.

    Raises:
        UsageError: an argument needs a library that is missing.
    """
    libraries = (_TRANSFORMER_ENGINE, _APEX, _ACCUMULATION)
    installed = {name for name in libraries if find_spec(name) is not None}
    refuse_missing_kernels(args, installed)
    for line in lost_fused_paths(args, installed):
        print_rank_0(f"> not fused: {line}")


def refuse_missing_kernels(args: argparse.Namespace, installed: Collection[str]) -> None:
    """Refuses what Megatron would fail over while it builds the model.

    Args:
        args: command line.
        installed: names of the modules that can be imported.

    Raises:
        UsageError: naming the argument, the library and the remedy.
    """
    if args.transformer_impl == "transformer_engine" and _TRANSFORMER_ENGINE not in installed:
        raise UsageError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not "
            "installed: run in NVIDIA's PyTorch container, pip install 'megatron-tst[te]', or use "
            "--transformer-impl local, which is slower and has no FP8."
        )
    # Megatron's output layer is its own module, with Transformer Engine too.
    if args.gradient_accumulation_fusion and _ACCUMULATION not in installed:
        raise UsageError(
            "Gradient accumulation fusion, which is on by default, needs apex with its CUDA "
            f"extensions ({_ACCUMULATION}), which is not installed: run in NVIDIA's PyTorch "
            "container, install apex, or add --no-gradient-accumulation-fusion."
        )
    _refuse_optimizer_of_torch(args, installed)


def _refuse_optimizer_of_torch(args: argparse.Namespace, installed: Collection[str]) -> None:
    if not (args.use_distributed_optimizer and args.save):
        return
    # Megatron 0.19 asserts a count of steps at every load, which torch's Adam has only afterwards.
    if _TRANSFORMER_ENGINE not in installed and _APEX not in installed:
        raise UsageError(
            f"--use-distributed-optimizer with --save {args.save} needs Transformer Engine or "
            "apex, neither of which is installed: Megatron saves the state of torch's Adam and "
            "cannot load it again. Run in NVIDIA's PyTorch container, or remove "
            "--use-distributed-optimizer."
        )


def lost_fused_paths(args: argparse.Namespace, installed: Collection[str]) -> list[str]:
    """What is computed without a fused kernel, one line for each.

    Args:
        args: command line.
        installed: names of the modules that can be imported.
    """
    has_engine, has_apex = _TRANSFORMER_ENGINE in installed, _APEX in installed
    is_local = args.transformer_impl == "local"
    lost = {
        "optimizer step and gradient clipping, by torch: neither Transformer Engine nor apex is "
        "installed": not has_engine and not has_apex,
        "attention, by Megatron's local modules: Transformer Engine is not installed": is_local
        and not has_engine,
        "norms, by torch: apex is not installed (--transformer-impl local)": is_local
        and not has_apex,
        "accumulation of weight gradients: apex is not installed or "
        "--no-gradient-accumulation-fusion was given": not args.gradient_accumulation_fusion,
    }
    return [line for line, is_lost in lost.items() if is_lost]
