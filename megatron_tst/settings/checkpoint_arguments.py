"""Which non-persistent checkpoints work, in Megatron-Core 0.19.2 and here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.settings.arguments import bags_flag, has_bags


def checkpoint_conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Settings of non-persistent checkpoints that are refused.

    Args:
        args: command line, not validated.

    Returns:
        Messages, each naming the argument, its value, the reason and the remedy.
    """
    kind, interval = args.non_persistent_ckpt_type, args.non_persistent_save_interval
    if kind is None and interval:
        yield (
            f"--non-persistent-save-interval {interval} does not work without "
            "--non-persistent-ckpt-type: Megatron would end when it saves. Add global, or remove "
            "it."
        )
    if kind == "local" and has_bags(args):
        # BaseCheckpointManager.find_latest of nvidia-resiliency-ext is a collective.
        yield (
            f"--non-persistent-ckpt-type local does not work with {bags_flag(args)}: the ranks "
            "find out together which one is the newest, and its settings are compared before they "
            "are connected. Use global."
        )
    folder = args.non_persistent_global_ckpt_dir
    if kind == "global" and folder and args.save:
        save = Path(args.save).resolve()
        if Path(folder).resolve() in (save, *save.parents):
            yield (
                f"--non-persistent-global-ckpt-dir {folder} does not work with --save "
                f"{args.save}: Megatron removes all iter_* folders below it but the last. Use a "
                "folder of its own."
            )
