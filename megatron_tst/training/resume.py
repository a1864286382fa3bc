"""Refuses to continue a checkpoint under settings that would move the switch or change the data."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint

from megatron_tst.schedule import SuperpositionSchedule


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
    if not check_is_distributed_checkpoint(str(folder)):
        if schedule.config.enabled:
            raise ValueError(
                f"--load {args.load}: {folder.name} is not a torch_dist checkpoint, so its "
                "superposition settings cannot be read: convert it, or pass --finetune."
            )
        return
    saved_args = load_common_state_dict(str(folder)).get("args")
    saved = getattr(saved_args, "tst_settings", None) or {"bag_size": 1}
    current = _settings(schedule)
    if saved["bag_size"] == current["bag_size"] == 1:
        return
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"--load {args.load} was trained with {name} = {saved.get(name)}, and this command "
                f"gives {current.get(name)}: resume with the settings that it started with "
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
    if args.load is None:
        return None
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    latest = tracker.read_text().strip()
    if args.ckpt_step is not None:
        latest = str(args.ckpt_step)
    name = "release" if latest == "release" else f"iter_{int(latest):07d}"
    return Path(args.load) / name
