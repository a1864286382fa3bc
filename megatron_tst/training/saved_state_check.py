"""Refuses to continue a checkpoint whose weights or optimizer state were saved wrongly."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_tst.checkpoint.findings import Fault
from megatron_tst.checkpoint.sampled_masters import sample_masters
from megatron_tst.checkpoint.saved_state import read_saved_state
from megatron_tst.checkpoint.verification import verify_checkpoint
from megatron_tst.common.errors import UsageError

# Of a tensor. What was saved at a wrong place is nearly all wrong.
_WRONG_SHARE = 0.01


def refuse_wrong_state(args: Namespace, folder: Path, saved: Namespace) -> None:
    """Looks at a checkpoint as ``--tst-verify-checkpoint`` says.

    Args:
        args: command line.
        folder: of the iteration.
        saved: Megatron's arguments in it.

    Raises:
        UsageError: naming what is wrong and the remedy.
    """
    faults = _faults(args, folder, saved)
    if args.no_load_optim:
        faults = [fault for fault in faults if not fault.is_of_optimizer]
    if not faults:
        return
    worst = max(faults, key=lambda fault: fault.count)
    if all(fault.is_of_optimizer for fault in faults):
        remedy = (
            "the state of its optimizer was saved wrongly, as Megatron-Core 0.19.2 by itself does "
            "with --dist-ckpt-optim-fully-reshardable. Pass --ckpt-step with an older checkpoint, "
            "or --no-load-optim"
        )
    else:
        remedy = "pass --ckpt-step with an older checkpoint, or copy it again"
    raise UsageError(
        f"--load {args.load}: {folder.name} has faults, such as {worst.where} ({worst.text}, "
        f"{worst.share:.0%} of what was looked at): {remedy}. tst verify "
        f"--checkpoint {folder} shows all of them and can rebuild the masters; "
        "--tst-verify-checkpoint off loads it as it is."
    )


def _faults(args: Namespace, folder: Path, saved: Namespace) -> list[Fault]:
    how = args.tst_verify_checkpoint
    if how == "full":
        # Once: every process reading a whole checkpoint would take long.
        return verify_checkpoint(folder).faults if os.environ.get("RANK", "0") == "0" else []
    if how == "off" or args.no_load_optim:
        return []
    result = sample_masters(read_saved_state(folder), saved)
    return [fault for fault in result.faults if fault.share > _WRONG_SHARE]
