"""Which optimizers work, in Megatron-Core 0.19.2 and here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.arguments import has_bags

_PACKAGE = "emerging-optimizers"
_OF_MEGATRON = ("adam", "sgd")


def optimizer_conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Settings that optimizers other than Adam on its device do not work with.

    Args:
        args: command line, not validated.

    Returns:
        Messages, each naming both settings, the reason and the remedy.
    """
    if args.optimizer_cpu_offload and has_bags(args) and args.tst_reset_at_switch == "optimizer":
        # HybridDeviceOptimizer.gpu_optimizer, of Transformer Engine, counts in its own groups.
        yield (
            "--optimizer-cpu-offload does not work with --tst-reset-at-switch optimizer: the part "
            "on the GPU counts its steps where they cannot be reset. Remove one."
        )
    if args.optimizer in _OF_MEGATRON:
        return
    is_layer_wise = args.use_distributed_optimizer or args.optimizer.startswith("dist_")
    reasons = {
        # Megatron-Core: optim_state_to_sharding_state.
        f"--ckpt-format {args.ckpt_format}": (
            args.optimizer == "soap" and args.ckpt_format == "torch_dist",
            "Megatron saves state of the shape of a weight only, and it has others",
        ),
        "--use-distributed-optimizer without --bf16": (
            is_layer_wise and not args.bf16,
            "Megatron asks an optimizer for its loss scale that has none; add --bf16",
        ),
        "--fp16": (args.fp16, "Megatron has it for --bf16 and fp32"),
        "--use-torch-fsdp2": (args.use_torch_fsdp2, "Megatron shards no weights for it"),
    }
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            named = f"--optimizer {args.optimizer} does not work with {setting}"
            yield f"{named}: {reason}. Change one of them."
    is_prepared = _installed("megatron-core") >= (0, 20) or _installed(_PACKAGE) < (0, 3)
    if args.optimizer == "adaptive_muon" and not is_prepared:
        yield (
            f"--optimizer adaptive_muon does not work with {_PACKAGE} {version(_PACKAGE)}, which "
            "reads a scale_mode that Megatron 0.19 does not set. Use muon."
        )


def refuse_missing_optimizer(args: argparse.Namespace) -> None:
    """Refuses an optimizer whose package is missing, before a model is built.

    Raises:
        UsageError: naming the package.
    """
    if args.optimizer not in _OF_MEGATRON and _installed(_PACKAGE) < (0, 2):
        raise UsageError(
            f"--optimizer {args.optimizer} needs the package {_PACKAGE} in version 0.2 or newer: "
            f"pip install {_PACKAGE}"
        )


def _installed(package: str) -> tuple[int, ...]:
    """The first two parts of a package's version, (0, 0) without the package."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)
