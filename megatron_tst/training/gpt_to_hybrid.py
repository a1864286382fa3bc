"""Continues a checkpoint of a GPTModel as a HybridModel.

Megatron translates while it loads, weights and state of the optimizer, where every layer of the
GPTModel is of one kind; there is no way back. What it cannot translate is refused here, before
anything is built. In two things it is helped:

* Local modules of GPTModel name the norm before experts as if it were fused with a linear layer,
  those of HybridModel do not: the translation would not find it.
* ``--finetune`` and ``--pretrained-checkpoint`` begin with a new optimizer, but not over this
  translation, where Megatron loads the state of the optimizer with the weights.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import gpt_checkpoint_interop
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_tst.checkpoint.hf_mapping import FUSED_NORM, SEPARATE_NORM
from megatron_tst.common.errors import UsageError
from megatron_tst.settings.attention_layers import pattern_of
from megatron_tst.upstream.patches import wrap

_THROUGH_HF = (
    "or go by way of Hugging Face, without the state of the optimizer: tst convert to-hf, and tst "
    "convert from-hf with --model-kind"
)


def is_translated(args: Namespace, saved: Any) -> bool:
    """Whether the checkpoint is of a GPTModel and this command builds a HybridModel."""
    return bool(args.hybrid_layer_pattern) and not pattern_of(saved)


def prepare_translation(args: Namespace, saved: Any, folder: Path, named: str) -> None:
    """Refuses what Megatron cannot translate, and mends what it translates to wrong names.

    Does nothing where both models are of one kind.

    Args:
        args: command line.
        saved: Megatron's arguments in the checkpoint.
        folder: of the iteration.
        named: flag and value that name the checkpoint, for messages.

    Raises:
        UsageError: naming both models, the reason and the remedy.
        RuntimeError: Megatron has no such translation.
    """
    if not args.hybrid_layer_pattern and (pattern := pattern_of(saved)):
        raise UsageError(
            f"{named} is of a HybridModel (--hybrid-layer-pattern {pattern}), and this command "
            "builds a GPTModel: Megatron translates checkpoints of GPTModel to HybridModel and not "
            f"back. Pass --hybrid-layer-pattern {pattern} instead of --num-layers, {_THROUGH_HF} "
            "gpt."
        )
    if not is_translated(args, saved):
        return
    if reason := _hindrance(args, saved):
        raise UsageError(
            f"{named} is of a GPTModel, and this command builds a HybridModel "
            f"(--hybrid-layer-pattern {args.hybrid_layer_pattern}): {reason}. Pass the arguments "
            f"of the GPTModel, {_THROUGH_HF} hybrid."
        )
    _refuse_sharding(args, saved, named)
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    wrap(
        "megatron.core.dist_checkpointing.gpt_checkpoint_interop:"
        "retarget_sharded_state_dict_to_gpt_checkpoint",
        lambda upstream: _with_names_of(stored, upstream),
    )


def prepare_start(args: Namespace, saved: Any, folder: Path, named: str) -> None:
    """As :func:`prepare_translation`, for a new run from the weights: with a new optimizer.

    Args:
        args: command line, changed in place.
        saved: Megatron's arguments in the checkpoint.
        folder: of the iteration.
        named: flag and value that name the checkpoint, for messages.

    Raises:
        UsageError: naming both models, the reason and the remedy.
    """
    if is_translated(args, saved):
        args.no_load_optim = True
    prepare_translation(args, saved, folder, named)


def _hindrance(args: Namespace, saved: Any) -> str | None:
    """Why Megatron would not translate, None where it does."""
    try:
        maps = gpt_checkpoint_interop.gpt_compatible_layer_maps(args.hybrid_layer_pattern)
    except ValueError as error:
        return str(error).rstrip(".")
    if maps.num_gpt_layers != saved.num_layers:
        return (
            f"the pattern has {maps.num_gpt_layers} layers, and the checkpoint {saved.num_layers}"
        )
    has, had = "E" in args.hybrid_layer_pattern, bool(getattr(saved, "num_experts", None))
    if has != had:
        return f"its layers are {'with' if had else 'without'} experts"
    if getattr(saved, "mtp_num_layers", None):
        return "Megatron does not translate --mtp-num-layers"
    frequency = getattr(saved, "moe_layer_freq", 1)
    if had and frequency != 1:
        return (
            f"with --moe-layer-freq {frequency} Megatron stores layers one by one, which its "
            "translation does not read"
        )
    return None


def _refuse_sharding(args: Namespace, saved: Any, named: str) -> None:
    if args.no_load_optim or getattr(saved, "no_save_optim", False):
        return
    sharded = getattr(saved, "use_distributed_optimizer", False)
    if sharded and not getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        raise UsageError(
            f"{named} is of a GPTModel and was saved without --dist-ckpt-optim-fully-reshardable: "
            "Megatron cannot translate the state of the optimizer for --hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern}. Save once with that flag as a GPTModel, or pass "
            "--no-load-optim, with which the moments start at 0 and the learning rate schedule "
            "goes on."
        )


def _with_names_of(stored: Collection[str], upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def retarget(sharded_state_dict: Any, layer_maps: Any) -> None:
        upstream(sharded_state_dict, layer_maps)
        for entry in nested_values(sharded_state_dict):
            if isinstance(entry, ShardedBase) and entry.key not in stored:
                fused = entry.key.replace(SEPARATE_NORM, FUSED_NORM)
                entry.key = fused if fused in stored else entry.key

    return retarget
