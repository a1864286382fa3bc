"""Refuses to continue a checkpoint under settings that would move the switch or change the data."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_tst.checkpoint.argument_names import add_current_names
from megatron_tst.checkpoint.torch_dist_index import (
    INDEX_FILE,
    is_newer_torch,
    is_of_newer_torch,
    newer_torch,
    older_torch,
)
from megatron_tst.checkpoint.tracker import RELEASE
from megatron_tst.common.errors import UsageError, raise_interrupt
from megatron_tst.data.files import fingerprint
from megatron_tst.data.named_corpora import data_path_prefixes, data_weights
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.phases import Phase, recorded_phases
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.checkpoint_choice import (
    checkpoint_to_load,
    damaged_checkpoint,
    last_checkpoint,
)
from megatron_tst.training.failures import one_line
from megatron_tst.training.gpt_to_hybrid import prepare_start, prepare_translation
from megatron_tst.training.resume_batches import (
    DRAWN_SIZES,
    drawn_sizes,
    refuse_other_draws,
    refuse_other_past,
    refuse_other_switch,
)
from megatron_tst.training.resume_model import refuse_other_model
from megatron_tst.training.resume_schedule import refuse_other_learning_rate
from megatron_tst.training.saved_state_check import refuse_wrong_state

_logger = logging.getLogger(__name__)
# What a checkpoint was made with that does not hold the setting.
_BEFORE = {"inter_document_masking": False}

# What the user passes to change a setting, where it is not --tst- and the name of the setting.
_FLAGS = {
    "sequence_length": "--seq-length",
    "seed": "--seed",
    "split": "--split",
    "data_weights": "--data-path with the weights",
    "eod_mask_loss": "--eod-mask-loss",
    "inter_document_masking": "--dataloader-inter-document-masking",
    "corpus_objects": "--data-path with objects",
    "corpus_bytes": "--data-path with a corpus of this many bytes:",
    "corpus_fingerprint": "--data-path with a corpus of other content, of fingerprint",
}


def record_settings(args: Namespace, schedule: SuperpositionSchedule) -> None:
    """Puts the resolved settings among Megatron's arguments, which every checkpoint stores."""
    # A plain string: checkpoints hold no class of torch.
    args.tst_torch_version = str(torch.__version__)
    args.tst_settings = _settings(args, schedule)
    args.tst_seconds = 0.0


def check_resume(args: Namespace, schedule: SuperpositionSchedule) -> int:
    """Compares the run with the checkpoint that it would continue, before anything is built.

    A new run from the weights (``--finetune``, or a release without optimizer such as an imported
    model) is not compared, nor is one that only evaluates (``--skip-train``).

    Returns:
        The steps that are done: 0 for a new run.

    Raises:
        UsageError: naming the setting, both values and the remedy.
    """
    folder = checkpoint_to_load(args)
    if folder is None or args.finetune:
        _check_start(args, folder)
        return 0
    steps_done = 0 if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))
    if not _is_distributed(args, folder):
        if schedule.config.enabled and not args.skip_train:
            raise UsageError(
                f"--load {args.load}: {folder.name} is not a torch_dist checkpoint, so its "
                "superposition settings cannot be read: pass --finetune for a new run from its "
                "weights."
            )
        return steps_done
    saved_args = _saved_arguments(args, folder)
    _warn_of_newer_torch(args, saved_args, folder)
    prepare_translation(args, saved_args, folder, f"--load {args.load}")
    if folder.name == RELEASE or args.skip_train:
        return steps_done
    refuse_other_model(args, saved_args)
    _refuse_other_optimizer(args, saved_args)
    _refuse_no_moments(args, saved_args, folder)
    saved = getattr(saved_args, "tst_settings", None) or {"bag_size": 1}
    current = _settings(args, schedule)
    args.tst_seconds = getattr(saved_args, "tst_seconds", 0.0)
    args.tst_left_out = getattr(saved_args, "tst_left_out", [])
    before = recorded_phases(saved)
    is_superposed = schedule.config.enabled or len(before) > 1
    if is_superposed:
        _refuse_other_settings(args, saved, current, before)
        refuse_other_draws(args, schedule, saved)
    has_ramp = args.step_batch_size_schedule or getattr(
        saved_args, "step_batch_size_schedule", None
    )
    if steps_done and (is_superposed or has_ramp):
        refuse_other_past(args, schedule, saved_args, steps_done)
    if is_superposed:
        refuse_other_switch(args, schedule, before)
    if steps_done:
        refuse_other_learning_rate(args, schedule, saved_args)
    # Last: it reads more than the others.
    refuse_wrong_state(args, folder, saved_args)
    return steps_done


def _check_start(args: Namespace, folder: Path | None) -> None:
    """Looks at a checkpoint of which a new run takes the weights."""
    named = f"--load {args.load}"
    if folder is None and (start := getattr(args, "pretrained_checkpoint", None)):
        # Megatron says what is wrong with one that it cannot find.
        named, folder = f"--pretrained-checkpoint {start}", last_checkpoint(Path(start))
    if folder is not None and folder.is_dir() and _is_distributed(args, folder):
        _check_index_of_weights(args, folder)
        prepare_start(args, _saved_arguments(args, folder), folder, named)


def _check_index_of_weights(args: Namespace, folder: Path) -> None:
    """Refuses weights for a new run that this torch cannot read."""
    if not (folder / INDEX_FILE).is_file():
        return
    try:
        FileSystemReader(str(folder)).read_metadata()
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise_interrupt(error)
        raise _damaged(args, folder, error) from error


def _warn_of_newer_torch(args: Namespace, saved: Any, folder: Path) -> None:
    """Says that there is no way back from a newer torch, before it saves anything."""
    before = getattr(saved, "tst_torch_version", None)
    if before and is_newer_torch(torch.__version__, before) and args.rank == 0:
        _logger.warning("%s", older_torch(folder, before))


def _refuse_other_settings(
    args: Namespace,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    phases: Sequence[Phase],
) -> None:
    for name in current:
        # Another batch size may move the step of the switch; its sample is compared elsewhere.
        if name in ("phases", DRAWN_SIZES):
            continue
        # A checkpoint of an earlier version does not hold every setting.
        known = SETTINGS.get(name)
        before = known.default if known else _BEFORE.get(name, current[name])
        if (was := saved.get(name, before)) != current[name]:
            flag = known.flag if known else _FLAGS[name]
            raise UsageError(
                f"--load {args.load} was trained with {flag} {was}, and this command "
                f"has {current[name]}: resume with the settings that it started with "
                f"(--tst-bag-size {saved['bag_size']}, switch at step {phases[-1].first_step}), "
                "or start a new run from its weights with --finetune."
            )


def _refuse_other_optimizer(args: Namespace, saved: Any) -> None:
    """Refuses a layout that Megatron cannot load the saved state of the optimizer at."""
    if args.no_load_optim or args.skip_train:
        return
    if getattr(saved, "no_save_optim", False):
        raise UsageError(
            f"--load {args.load} was saved with --no-save-optim, so that it holds no state of the "
            "optimizer: pass --no-load-optim, with which the learning rate schedule goes on and "
            "the moments start at 0."
        )
    was_16_bit, is_16_bit = (bool(each.bf16 or each.fp16) for each in (saved, args))
    if was_16_bit != is_16_bit and not args.use_distributed_optimizer:
        raise UsageError(
            f"--load {args.load} was saved {'with' if was_16_bit else 'without'} --bf16 or --fp16, "
            f"and this command is {'with' if is_16_bit else 'without'}: the state of the optimizer "
            "has main weights for 16-bit models only. Keep the setting, or pass --no-load-optim."
        )
    was_layer_wise, is_layer_wise = (
        bool(getattr(each, "use_layer_wise_distributed_optimizer", False)) for each in (saved, args)
    )
    if was_layer_wise != is_layer_wise:
        raise UsageError(
            f"--load {args.load} was saved {'with' if was_layer_wise else 'without'} "
            f"--use-distributed-optimizer, and this command is "
            f"{'with' if is_layer_wise else 'without'}: the state of --optimizer {args.optimizer} "
            "has other names in a checkpoint. Keep the setting, or pass --no-load-optim."
        )
    is_distributed = getattr(saved, "use_distributed_optimizer", False)
    reasons = {}
    if bool(is_distributed) != bool(args.use_distributed_optimizer):
        reasons["use_distributed_optimizer"] = "its state has another form in a checkpoint"
    experts = getattr(saved, "expert_model_parallel_size", 1), args.expert_model_parallel_size
    if args.num_experts and 1 in experts:
        reasons["expert_model_parallel_size"] = (
            "Megatron has an optimizer of their own for experts on several ranks (sizes above 1 "
            "may change)"
        )
    if is_distributed and not getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        reason = (
            "it was saved without --dist-ckpt-optim-fully-reshardable, so that only the number of "
            "data-parallel processes may change (save once with that flag in the old layout)"
        )
        reasons["tensor_model_parallel_size"] = reasons["pipeline_model_parallel_size"] = reason
    for name, reason in reasons.items():
        was, now = getattr(saved, name, 1), getattr(args, name)
        if was != now:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--load {args.load} was saved with {flag} {was}, and this command has {now}: the "
                f"state of the optimizer does not fit, {reason}. Keep the setting, or pass "
                "--no-load-optim, with which the moments start at 0 and the learning rate "
                "schedule goes on."
            )


def _refuse_no_moments(args: Namespace, saved: Any, folder: Path) -> None:
    """Refuses a checkpoint that plain Megatron wrote before the first step that fp16 did."""
    if not getattr(saved, "fp16", False) or args.optimizer != "adam":
        return
    if args.no_load_optim or getattr(saved, "no_save_optim", False):
        return
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    if not any("exp_avg" in name for name in stored):
        raise UsageError(
            f"--load {args.load}: {folder.name} holds no state of the optimizer, because with "
            "--fp16 no step had been done when it was saved (the loss scale was still falling), "
            "and Megatron cannot load that. Its weights are those that the run began with: start "
            "it again with another --save and --load, or pass --no-load-optim."
        )


def _settings(args: Namespace, schedule: SuperpositionSchedule) -> dict[str, object]:
    # Given as a ratio or as steps: what counts of phase 1 is where it puts the switch.
    method = schedule.config.method()
    phases: dict[str, object] = {
        "phases": [phase.record() for phase in schedule.phases],
        "sequence_length": schedule.sequence_length,
    }
    if schedule.config.bag_sizes is not None:
        phases[DRAWN_SIZES] = drawn_sizes(schedule)
    data = {
        "seed": args.seed,
        "split": args.split,
        "data_weights": data_weights(args),
        "eod_mask_loss": args.eod_mask_loss,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    return {**method, **phases, **data, **corpus_identity(args)}


def corpus_identity(args: Namespace) -> dict[str, object]:
    """What stands for the corpora of a run: size and content of files, which may move.

    Those in an object storage are not read for it: their paths stand for them.
    """
    prefixes = data_path_prefixes(args)
    found = [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx")]
    files = [file for file in found if os.path.isfile(file)]
    remote = [prefix for prefix in prefixes if is_object_storage_path(prefix)]
    return {
        **({"corpus_objects": remote} if remote else {}),
        "corpus_bytes": sum(os.path.getsize(path) for path in files if path.endswith(".bin")),
        "corpus_fingerprint": fingerprint(files),
    }


def _is_distributed(args: Namespace, folder: Path) -> bool:
    try:
        return bool(check_is_distributed_checkpoint(str(folder)))
    except ValueError as error:
        raise _damaged(args, folder, error) from error


def _saved_arguments(args: Namespace, folder: Path) -> Any:
    """Megatron's arguments of the run that wrote a checkpoint."""
    try:
        # First, because torch logs a traceback when it finds no metadata on the way to the rest.
        metadata = FileSystemReader(str(folder)).read_metadata()
        _check_shards(folder, metadata)
        saved = load_common_state_dict(str(folder)).get("args")
    # Damaged files raise all kinds, and torch's own exception is no Exception.
    except (Exception, CheckpointException) as error:
        raise_interrupt(error)
        raise _damaged(args, folder, error) from error
    if isinstance(saved, Namespace):
        add_current_names(saved)
    return saved


def _check_shards(folder: Path, metadata: Metadata) -> None:
    """Compares the size of each file of a checkpoint with what lies in it; reads none of them."""
    expected: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        end = stored.offset + stored.length
        expected[stored.relative_path] = max(end, expected.get(stored.relative_path, 0))
    for name, size in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size:
            problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UsageError(f"{name} {problem}")


def _damaged(args: Namespace, folder: Path, error: BaseException) -> UsageError:
    index = folder / INDEX_FILE
    if is_of_newer_torch(index):
        return UsageError(f"{newer_torch(index)}.")
    return damaged_checkpoint(folder, args, one_line(error))
