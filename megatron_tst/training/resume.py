"""Refuses to continue a checkpoint under settings that would move the switch or change the data."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint

from megatron_tst.schedule import SuperpositionSchedule


_TRACKER = "latest_checkpointed_iteration.txt"

# What the user passes to change a setting, where it is not --tst- and the name of the setting.
_FLAGS = {
    "switch_step": "--tst-steps",
    "switch_sample": "--tst-steps times --global-batch-size",
    "sequence_length": "--seq-length",
}


def record_settings(args: Namespace, schedule: SuperpositionSchedule) -> None:
    """Puts the resolved settings among Megatron's arguments, which every checkpoint stores."""
    args.tst_switch_step = schedule.switch_step
    args.tst_settings = _settings(schedule)
    args.tst_seconds = 0.0


def check_resume(args: Namespace, schedule: SuperpositionSchedule) -> None:
    """Compares the run with the checkpoint that it would continue, before anything is built.

    Fine-tuning (``--finetune``) starts a new run from the weights and is not compared.

    Raises:
        ValueError: naming the setting, both values and the remedy.
    """
    folder = _checkpoint_to_load(args)
    if folder is None or args.finetune:
        return
    if not _is_distributed(folder):
        if schedule.config.enabled:
            raise ValueError(
                f"--load {args.load}: {folder.name} is not a torch_dist checkpoint, so its "
                "superposition settings cannot be read: convert it, or pass --finetune."
            )
        return
    saved_args = _saved_arguments(folder)
    saved = getattr(saved_args, "tst_settings", None) or {"bag_size": 1}
    current = _settings(schedule)
    if saved["bag_size"] == current["bag_size"] == 1:
        return
    for name in current:
        if saved.get(name) != current[name]:
            flag = _FLAGS.get(name, f"--tst-{name.replace('_', '-')}")
            raise ValueError(
                f"--load {args.load} was trained with {flag} {saved.get(name)}, and this command "
                f"has {current[name]}: resume with the settings that it started with "
                f"(--tst-bag-size {saved['bag_size']}, switch at step "
                f"{saved.get('switch_step', 0)}), or start a new run from its weights with "
                "--finetune."
            )
    args.tst_seconds = getattr(saved_args, "tst_seconds", 0.0)


def _settings(schedule: SuperpositionSchedule) -> dict[str, object]:
    resolved = schedule.config.to_dict()
    # Given as a ratio or as steps: what counts is where it puts the switch.
    for name in ("step_ratio", "steps"):
        resolved.pop(name)
    phases = {
        "switch_step": schedule.switch_step,
        "switch_sample": schedule.switch_sample,
        "sequence_length": schedule.sequence_length,
    }
    return {**resolved, **phases}


def _checkpoint_to_load(args: Namespace) -> Path | None:
    """Folder of the checkpoint that Megatron will load, None without one."""
    if args.load is None:
        return None
    tracker = Path(args.load) / _TRACKER
    # Megatron takes a step of 0 for none.
    if args.ckpt_step:
        name, source = f"iter_{args.ckpt_step:07d}", f"--ckpt-step {args.ckpt_step}"
    elif tracker.is_file():
        name, source = _read_tracker(tracker), str(tracker)
    else:
        return None
    folder = Path(args.load) / name
    if not folder.is_dir():
        found = sorted(path.name for path in Path(args.load).glob("iter_*"))
        raise ValueError(
            f"--load {args.load}: {source} names the checkpoint {name}, which is not there "
            f"(found: {', '.join(found) or 'none'}). Pass --ckpt-step with a checkpoint that is, "
            "or another --load."
        )
    return folder


def _read_tracker(tracker: Path) -> str:
    latest = tracker.read_text(errors="replace").strip()
    if latest == "release":
        return latest
    if not latest.isdecimal():
        raise ValueError(
            f"{tracker} holds {latest[:40]!r} instead of the step of the last checkpoint: write "
            "the number of a complete iter_* folder into it, or pass --ckpt-step."
        )
    return f"iter_{int(latest):07d}"


def _is_distributed(folder: Path) -> bool:
    try:
        return bool(check_is_distributed_checkpoint(str(folder)))
    except ValueError as error:
        raise _damaged(folder, error) from error


def _saved_arguments(folder: Path) -> Any:
    """Megatron's arguments of the run that wrote a checkpoint."""
    try:
        return load_common_state_dict(str(folder)).get("args")
    except Exception as error:  # Upstream, torch and pickle raise all kinds over damaged files.
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} is damaged ({error}): pass --ckpt-step with another checkpoint of its folder."
    )
