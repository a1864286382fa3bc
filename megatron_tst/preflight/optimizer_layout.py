"""Which launches megatron-core 0.19.2 by itself saves a wrong state of the optimizer of.

See :mod:`megatron_tst.training.optimizer_sharding`, which mends it in the runs of this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from megatron_tst.preflight.findings import Finding, note
from megatron_tst.preflight.rank_parameters import is_fp8_weight
from megatron_tst.preflight.rank_simulation import Stage, gradient_buffers


def misplaced_note(args: argparse.Namespace, stages: Sequence[Stage]) -> list[Finding]:
    """What to know of checkpoints of a launch that were written without the mend.

    Args:
        args: validated.
        stages: the first rank of each.
    """
    share = misplaced_share(args, stages)
    if not share:
        return []
    return [
        note(
            "megatron-core 0.19.2 without the mend of this package, as in its first versions and "
            f"in Megatron's own scripts, saves with this layout {share:.0%} of the master weights "
            "and moments in wrong places (--dist-ckpt-optim-fully-reshardable): check earlier "
            "checkpoints with tst verify (docs/troubleshooting.md)."
        )
    ]


def misplaced_share(args: argparse.Namespace, stages: Sequence[Stage]) -> float:
    """The share of parameters behind a bucket with a padded end, whose state Megatron misplaces.

    By Megatron's own layout. Megatron's local modules have the norms of a layer in other places
    than those of Transformer Engine, which may move a bucket's end by one of them.

    Args:
        args: validated.
        stages: one rank of each pipeline stage.

    Returns:
        Of all elements on these ranks; 0 where another format or optimizer is saved.
    """
    if not (args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable):
        return 0.0

    def is_kept_in_fp8(chunk: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> bool:
        return bool(args.fp8 and args.fp8_param_gather) and is_fp8_weight(
            args, chunk, name, parameter
        )

    misplaced = total = 0
    for stage in stages:
        for _, layout in gradient_buffers(args, stage, is_kept_in_fp8):
            first_padded = next(
                (
                    number
                    for number, (begin, end) in enumerate(layout.bucket_indices)
                    if end - begin > layout.per_bucket_numel_unpadded[number]
                ),
                len(layout.bucket_indices),
            )
            for begin, end, bucket in layout.param_index_map.values():
                total += end - begin
                misplaced += (end - begin) * (bucket > first_padded)
    return misplaced / total if total else 0.0
