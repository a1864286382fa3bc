"""Modes of Megatron's loop in which it does not train on the batches as they come."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_tst.settings.arguments import bags_flag, has_bags


def mode_conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Modes that superposition, or the loss that leaves no logits, does not work with.

    Args:
        args: command line, validated or not.

    Returns:
        Messages, each naming both settings, the reason and the remedy.
    """
    saves = f"--logits-save-dir {args.logits_save_dir}"
    if has_bags(args):
        if args.logits_save_dir is not None:
            yield (
                f"{saves} does not work with {bags_flag(args)}: Megatron puts 0 in the place of "
                "the loss, and the logits of a bag are those of no token. Remove it, or save the "
                "logits of a trained model with --tst-bag-size 1."
            )
        if args.moe_use_upcycling:
            yield (
                f"--moe-use-upcycling does not work with {bags_flag(args)}: Megatron begins such a "
                "run at step 1 with no sample read, and the switch would come a step before that "
                "of the data. Upcycle with --tst-bag-size 1 into another --save folder first, and "
                "--load that with --finetune and --ckpt-step 1."
            )
        if args.override_ckpt_iteration is not None:
            yield (
                f"--override-ckpt-iteration {args.override_ckpt_iteration} does not work with "
                f"{bags_flag(args)}: the text in between would be read twice or never, and what "
                "belongs to a switch in between would not be done. Remove it; --ckpt-step starts "
                "from an earlier checkpoint."
            )
    elif args.logits_save_dir is not None and args.tst_loss_impl == "linear":
        yield (
            f"{saves} does not work with --tst-loss-impl linear: the output layer makes no logits. "
            "Use --tst-loss-impl auto."
        )
