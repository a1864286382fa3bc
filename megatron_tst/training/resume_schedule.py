"""Refuses to continue a checkpoint with another learning rate schedule, unless that is asked for.

Megatron ends after building the model when most of these values differ from the checkpoint's
(``OptimizerParamScheduler.load_state_dict``, and the groups of the optimizer, which it tells apart
by their learning rates), and takes another decay of WSD or start of the warm-up without a word.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_arguments import batch_sizes_from_args
from megatron_tst.settings.schedule import SuperpositionSchedule

_OVERRIDE = "--override-opt_param-scheduler"
_USE_CHECKPOINT = "--use-checkpoint-opt_param-scheduler"
# What Megatron does not keep in the state of its scheduler.
_NOT_IN_STATE = ("--lr-wsd-decay-", "--lr-warmup-init")


def refuse_other_learning_rate(
    args: Namespace, schedule: SuperpositionSchedule, saved: Any
) -> None:
    """Refuses another learning rate, weight decay, or schedule of them.

    Megatron counts the schedule in samples, a step as many as ``--global-batch-size`` asks for: it
    is compared in steps where both runs give it in steps of the same batch sizes, read and asked
    for, and in samples otherwise.

    Args:
        args: command line.
        schedule: phases and batch sizes of the command line.
        saved: Megatron's arguments in the checkpoint.

    Raises:
        UsageError: naming the arguments, both values, and what to pass instead.
    """
    _refuse_other_groups(args, saved)
    if args.override_opt_param_scheduler:
        return
    same_steps = (
        not (saved.train_samples or args.train_samples)
        and batch_sizes_from_args(saved) == schedule.batch_sizes
    )
    # A batch that --decrease-batch-size-if-needed makes smaller still counts as asked for.
    in_steps = same_steps and saved.global_batch_size == args.global_batch_size
    was, now = (_lengths(each, in_steps) | _values(each) for each in (saved, args))
    other = _differing(args, was, now)
    if not other:
        return
    if in_steps:
        remedy = _written(other, was)
    elif same_steps:
        remedy = _batch_size_and_steps(args, saved)
        was["--global-batch-size"] = saved.global_batch_size
        now["--global-batch-size"] = args.global_batch_size
        other = ["--global-batch-size", *other]
    else:
        rest = [name for name in other if name in _values(saved)]
        remedy = " ".join(filter(None, (learning_rate_flags(saved), _written(rest, was))))
    if args.use_checkpoint_opt_param_scheduler:
        remedy += f", which {_USE_CHECKPOINT} does not take from the checkpoint"
    else:
        remedy += f", or {_OVERRIDE} to go on with the values of this command"
    raise UsageError(
        f"--load {args.load} was trained with {'' if in_steps else 'the equivalent of '}"
        f"{_written(other, was)}, and this command has {_written(other, now)}, which changes the "
        f"learning rate, the weight decay or their schedule: pass {remedy}."
    )


def learning_rate_flags(saved: Any) -> str:
    """What to pass, in samples, for the schedule of a checkpoint."""
    flags = _lengths(saved, in_steps=False)
    if "--lr-warmup-fraction" in flags:
        del flags["--lr-warmup-samples"]
    return " ".join(f"{name} {value}" for name, value in flags.items() if value)


def _differing(args: Namespace, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of both whose values differ and are those of the command line in the end."""
    other = [name for name in was if name in now and was[name] != now[name]]
    if args.use_checkpoint_opt_param_scheduler:
        other = [name for name in other if name.startswith(_NOT_IN_STATE)]
    return other


def _batch_size_and_steps(args: Namespace, saved: Any) -> str:
    """What to pass where steps read as many samples as before, and other ones are asked for."""
    flags = f"--global-batch-size {saved.global_batch_size}"
    if getattr(saved, "decrease_batch_size_if_needed", False):
        flags += " --decrease-batch-size-if-needed"
    was, now = (_lengths(each, in_steps=True) | _values(each) for each in (saved, args))
    return " ".join(filter(None, (flags, _written(_differing(args, was, now), was))))


def _refuse_other_groups(args: Namespace, saved: Any) -> None:
    """Refuses what changes the groups of parameters whose state Megatron would load."""
    if args.no_load_optim:
        return
    had, has = (getattr(each, "decoupled_lr", None) for each in (saved, args))
    if (had is None) != (has is None):
        raise UsageError(
            f"--load {args.load} was trained with {_written(['--decoupled-lr'], _values(saved))}, "
            f"and this command has {_written(['--decoupled-lr'], _values(args))}: the state of the "
            "optimizer is grouped by learning rates. Keep the setting, or pass --no-load-optim."
        )
    if not getattr(args, "use_mup", False):
        return
    for name in ("lr", "min_lr"):
        was, now = getattr(saved, name, None), getattr(args, name)
        if was != now and args.override_opt_param_scheduler:
            raise UsageError(
                f"--load {args.load} was trained with --{name.replace('_', '-')} {was}, and this "
                f"command has {now}: with --use-mup the state of the optimizer is grouped by "
                "learning rates. Keep the value, or pass --no-load-optim."
            )


def _lengths(args: Any, in_steps: bool) -> dict[str, float | None]:
    """The schedule in steps or samples, as ``get_optimizer_param_scheduler`` resolves it."""
    unit, scale = ("samples", 1) if args.train_samples else ("iters", args.global_batch_size)
    if in_steps:
        scale = 1
    total = getattr(args, f"train_{unit}") * scale
    decay = getattr(args, f"lr_decay_{unit}")
    wsd_decay = getattr(args, f"lr_wsd_decay_{unit}", None)
    decay = total if decay is None else decay * scale
    fraction = args.lr_warmup_fraction
    warmup = getattr(args, f"lr_warmup_{unit}") * scale if fraction is None else fraction * decay
    name = "iters" if in_steps else "samples"
    lengths = {
        f"--train-{name}": total,
        f"--lr-decay-{name}": decay,
        f"--lr-warmup-{name}": warmup,
        f"--lr-wsd-decay-{name}": None if wsd_decay is None else wsd_decay * scale,
    }
    return lengths if fraction is None else {**lengths, "--lr-warmup-fraction": fraction}


def _values(args: Any) -> dict[str, Any]:
    """Learning rates, weight decays and styles, those that there are."""
    names = ["lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init"]
    names += ["lr_decay_style", "weight_decay_incr_style"]
    if getattr(args, "lr_decay_style", None) == "WSD":
        names.append("lr_wsd_decay_style")
    if getattr(args, "weight_decay_incr_style", "constant") == "constant":
        names.append("weight_decay")
    else:
        names += ["start_weight_decay", "end_weight_decay"]
    return {
        f"--{name.replace('_', '-')}": getattr(args, name) for name in names if hasattr(args, name)
    }


def _written(names: list[str], values: dict[str, Any]) -> str:
    return " ".join(
        f"no {name}" if (value := values.get(name)) is None else f"{name} {value}" for name in names
    )
