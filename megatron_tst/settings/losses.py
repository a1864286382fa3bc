"""Which loss a run computes, by its command line."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from megatron_tst.settings.arguments import has_bags


def losses_of_run(
    args: argparse.Namespace, has_gpu: bool, has_triton: bool | None = None
) -> dict[str, str]:
    """What computes the losses of a run, for its record: times compare where it is one thing.

    Args:
        args: validated command line.
        has_gpu: whether it runs on GPUs.
        has_triton: whether Triton is installed there; None: as it is here.

    Returns:
        By kind of target, ``bags`` where there are any and ``plain``: ``triton``, ``torch``,
        ``linear``, ``host`` with the name of its fusion, or ``cpu``, the kernels of the CPU
        platform, which serve both.
    """
    plain = plain_loss(args, has_gpu, has_triton)
    if not has_bags(args):
        return {"plain": plain}
    is_named = args.tst_loss_impl in ("torch", "triton", "linear")
    bags = args.tst_loss_impl if is_named else _ours(has_gpu, has_triton)
    return {"bags": bags, "plain": plain}


def plain_loss(args: argparse.Namespace, has_gpu: bool, has_triton: bool | None = None) -> str:
    """What computes the loss of single targets: phase 2, and a run without superposition."""
    if args.tst_loss_impl in ("torch", "triton", "linear"):
        return str(args.tst_loss_impl)
    if args.cross_entropy_loss_fusion:
        return f"host {args.cross_entropy_fusion_impl}"
    ours = _ours(has_gpu, has_triton)
    # Without Triton the host's is as good as ours in torch, whose bits are the same.
    is_host = args.tst_loss_impl == "host" or ours == "torch"
    return "host" if has_gpu and is_host else ours


def is_hosts(loss: str) -> bool:
    """Whether Megatron computes it, or what stands in for Megatron on a CPU."""
    return loss == "cpu" or loss.startswith("host")


def _ours(has_gpu: bool, has_triton: bool | None) -> str:
    if not has_gpu:
        return "cpu"
    if has_triton is None:
        has_triton = find_spec("triton") is not None
    return "triton" if has_triton else "torch"
