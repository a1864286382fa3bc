"""Plans a run: what a budget buys, whether superposition pays, and the flags to launch it with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.splits import training_share
from megatron_tst.planning.accounting import (
    PEAK_BF16_FLOPS,
    Cluster,
    ModelSize,
    parse_tokens,
)
from megatron_tst.planning.advisor import Plan, make_plan
from megatron_tst.planning.arms import Request
from megatron_tst.planning.check import predictions_table, published_tokens_per_second
from megatron_tst.planning.limits import describe, warnings
from megatron_tst.planning.loss_estimate import loss_model
from megatron_tst.planning.published import PUBLISHED_MODELS
from megatron_tst.planning.wording import (
    controls,
    evidence,
    launch_flags,
    outside_notes,
    plan_as_json,
    plan_table,
    superposition_flags,
)
from megatron_tst.settings.config import SETTINGS, SuperpositionConfig
from megatron_tst.settings.setting_fields import FLAGS, worded

_PIPED_WIDTH = 170
_USUAL_RATIO = 0.3
_SPEED_FLAGS = "pass --tokens-per-second-per-gpu (measured) or --mfu"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says, not yet checked."""
    parser = command_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help=f"published: {', '.join(PUBLISHED_MODELS)}")
    add("--parameters", metavar="N", help="or a size of your own, such as 7B")
    add(
        "--active-parameters",
        metavar="N",
        help="that a token is multiplied with (default: all); with multi-token prediction the "
        "output layer counts once more for each depth",
    )
    add("--num-layers", metavar="N", help="with --hidden-size: counts attention in the FLOPs")
    add("--hidden-size", metavar="H", help="query heads times head dimension")
    add = parser.add_argument_group("GPUs").add_argument
    add("--gpus", metavar="N", default="8", help="number (default: 8)")
    add("--gpu", metavar="KIND", default="B200", help=f"{', '.join(PEAK_BF16_FLOPS)}")
    add(
        "--tokens-per-second-per-gpu",
        metavar="T",
        help="measured on a baseline of the same loss",
    )
    add("--mfu", metavar="F", help="share of the dense bf16 peak that is used, 0 to 1")
    add = parser.add_argument_group("budget, one of").add_argument
    add("--gpu-hours", metavar="H")
    add("--currency", metavar="AMOUNT", help="money, with --price-per-gpu-hour")
    add("--price-per-gpu-hour", metavar="P", help="also shows the cost of a budget in hours")
    add = parser.add_argument_group("data and batch").add_argument
    add("--tokens", metavar="N", help="in the corpora, each counted once, such as 300B")
    add(
        "--split",
        default="9995,5,0",
        metavar="T,V,E",
        help="shares for training, validation and test, for the flags too (default: 9995,5,0)",
    )
    add("--max-epochs", metavar="E", default="1", help="how often it may be read (default: 1)")
    add("--global-batch-size", metavar="B", help="sequences a step (default: as published)")
    add("--seq-length", metavar="L", help="latent positions a sequence (default: 4096)")
    add = parser.add_argument_group("settings to use instead of choosing them").add_argument
    add("--tst-bag-size", metavar="S")
    add("--tst-step-ratio", metavar="R")
    add(
        "--tst-schedule",
        metavar="S:R,...",
        help="several bag sizes, to be shown beside the recommendation",
    )
    add(
        "--tst-bag-sizes",
        metavar="S,...",
        help=f"likewise, of which each step has one (ratio: that above, or {_USUAL_RATIO})",
    )
    add(
        "--tst-loss-impl",
        choices=tuple(SETTINGS["loss_impl"].choices),
        default="auto",
        help="of all runs; the speed has to be measured with the same loss (default: auto)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write the plan there too; whole or not at all")
    add("--published", action="store_true", help="show the published runs as predicted, and stop")
    return parser.parse_args(arguments)


def read_request(args: argparse.Namespace) -> Request:
    """What the arguments ask for.

    Raises:
        UsageError: one of them cannot be used.
    """
    size = _size(args)
    reference = loss_model(size).reference
    length = _whole("--seq-length", args.seq_length) or reference.sequence_length
    batch = _whole("--global-batch-size", args.global_batch_size)
    price = _optional_number("--price-per-gpu-hour", args.price_per_gpu_hour)
    cluster = Cluster(
        gpus=_whole("--gpus", args.gpus) or 1,
        tokens_per_second=_tokens_per_second(args, size, length),
        price_per_gpu_hour=price,
    )
    if args.tokens is None:
        raise UsageError(
            "--tokens is missing: pass how many tokens there are, such as --tokens 300B."
        )
    ratio = _optional_number("--tst-step-ratio", args.tst_step_ratio, below=1.0)
    return Request(
        size=size,
        cluster=cluster,
        gpu_hours=_gpu_hours(args, price),
        tokens=parse_tokens("--tokens", args.tokens),
        max_epochs=_epochs(args.max_epochs),
        global_batch_size=batch or max(1, reference.batch_tokens // length),
        sequence_length=length,
        bag_size=_whole("--tst-bag-size", args.tst_bag_size),
        step_ratio=ratio,
        several=_several(args, ratio or _USUAL_RATIO),
        loss_impl=args.tst_loss_impl,
        split=_split(args.split),
    )


def _several(args: argparse.Namespace, ratio: float) -> SuperpositionConfig | None:
    schedule, sizes = args.tst_schedule, args.tst_bag_sizes
    if schedule is None and sizes is None:
        return None
    with worded(FLAGS):
        return SuperpositionConfig(
            schedule=schedule, bag_sizes=sizes, step_ratio=None if sizes is None else ratio
        )


def _size(args: argparse.Namespace) -> ModelSize:
    if (args.model is None) == (args.parameters is None):
        raise UsageError(
            f"--model {args.model} and --parameters {args.parameters}: pass one of them; --model "
            f"is {', '.join(PUBLISHED_MODELS)}."
        )
    own = ("active_parameters", "num_layers", "hidden_size")
    if args.model is not None:
        for name in own:
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} goes with --parameters, not "
                    f"with --model {args.model}: leave one of them out."
                )
        if args.model not in PUBLISHED_MODELS:
            raise UsageError(
                f"--model is {args.model!r}: pass one of {', '.join(PUBLISHED_MODELS)}, or "
                "--parameters for a size of your own."
            )
        return PUBLISHED_MODELS[args.model].size
    return _own_size(args)


def _own_size(args: argparse.Namespace) -> ModelSize:
    parameters = round(parse_tokens("--parameters", args.parameters))
    active = parameters
    if args.active_parameters is not None:
        active = round(parse_tokens("--active-parameters", args.active_parameters))
    if active > parameters:
        raise UsageError(
            f"--active-parameters is {args.active_parameters}, more than --parameters "
            f"{args.parameters}: pass those that a token is multiplied with."
        )
    if (args.num_layers is None) != (args.hidden_size is None):
        raise UsageError(
            f"--num-layers {args.num_layers} and --hidden-size {args.hidden_size}: pass both, or "
            "neither to leave attention out of the FLOPs."
        )
    layers = _whole("--num-layers", args.num_layers) or 0
    width = _whole("--hidden-size", args.hidden_size) or 0
    return ModelSize(f"{args.parameters} parameters", parameters, active, layers, width)


def _tokens_per_second(args: argparse.Namespace, size: ModelSize, length: int) -> float:
    """Measured, from an MFU, or that of the published baseline."""
    if args.gpu not in PEAK_BF16_FLOPS:
        raise UsageError(f"--gpu is {args.gpu!r}: pass one of {', '.join(PEAK_BF16_FLOPS)}.")
    measured = args.tokens_per_second_per_gpu
    if measured is not None and args.mfu is not None:
        raise UsageError(
            f"--tokens-per-second-per-gpu {measured} and --mfu {args.mfu} both set the speed: pass "
            "one of them."
        )
    if measured is not None:
        return _number("--tokens-per-second-per-gpu", measured)
    mfu = _optional_number("--mfu", args.mfu, below=1.0)
    if mfu is not None:
        return mfu * PEAK_BF16_FLOPS[args.gpu] / size.flops_per_token(length)
    if args.model is None:
        raise UsageError(f"--parameters {args.parameters} has no published speed: {_SPEED_FLAGS}.")
    if args.gpu != "B200":
        raise UsageError(
            f"--gpu is {args.gpu}, and the published speeds are of B200: {_SPEED_FLAGS}."
        )
    return published_tokens_per_second(args.model)


def _gpu_hours(args: argparse.Namespace, price: float | None) -> float:
    if (args.gpu_hours is None) == (args.currency is None):
        raise UsageError(
            f"--gpu-hours {args.gpu_hours} and --currency {args.currency}: pass one of them."
        )
    if args.gpu_hours is not None:
        return _number("--gpu-hours", args.gpu_hours)
    if price is None:
        raise UsageError(
            f"--currency {args.currency} buys an unknown number of hours: pass "
            "--price-per-gpu-hour."
        )
    return _number("--currency", args.currency) / price


def _epochs(text: str) -> float:
    epochs = _number("--max-epochs", text)
    if epochs < 1:
        raise UsageError(f"--max-epochs is {text!r}: pass a number of at least 1.")
    return epochs


def _split(text: str) -> str:
    """As Megatron reads it, without spaces, which would make two words of it."""
    found = text.replace(" ", "")
    if not training_share(found):
        raise UsageError(
            f"--split is {text!r}: pass up to three shares, for training above 0, such as 9995,5,0."
        )
    return found


def _whole(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    # Twelve digits are more than any of them needs, and exact as a float.
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) > 0):
        raise UsageError(f"{flag} is {text!r}: pass a whole number of at least 1.")
    return int(text)


def _optional_number(flag: str, text: str | None, below: float = math.inf) -> float | None:
    return None if text is None else _number(flag, text, below)


def _number(flag: str, text: str, below: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < below:
        limit = "" if math.isinf(below) else f" and below {below:g}"
        raise UsageError(f"{flag} is {text!r}: pass a number above 0{limit}.")
    return value


def check_json_path(path: Path | None) -> None:
    """Refuses a path that cannot be written, before anything is computed."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json is {path}: pass a file in a folder that exists.")


def show(plan: Plan, console: Console) -> None:
    """Prints the plan, and the flags to launch it with."""
    request = plan.request
    steps = plan.recommended.steps
    console.print(
        f"{request.size.name} on {request.cluster.gpus} GPUs at "
        f"{request.cluster.tokens_per_second:,.0f} equivalent tokens a second and GPU\n\n"
        f"{plan.limit}: {plan.reason}.\n"
        f"Recommended: {describe(plan.recommended)}, {steps} steps\n",
        highlight=False,
    )
    console.print(plan_table(plan))
    for sentence in evidence(plan):
        console.print(f"\n{sentence}", highlight=False)
    computed = ", ".join(f"{kind} {loss}" for kind, loss in request.losses.items())
    console.print(f"\nSteps take equally long with and without bags; loss of {computed}.")
    notes = outside_notes(plan)
    if notes:
        console.print("\n* extrapolated, no published result to check it against:")
    for note in notes:
        console.print(f"  - {note}", highlight=False)
    for warning in warnings(plan):
        console.print(f"\nwarning: {warning}", highlight=False)
    console.print("\nFlags for python -m megatron_tst.pretrain:\n")
    console.print("  " + " \\\n  ".join(launch_flags(plan, plan.recommended)), highlight=False)
    for name, arm in plan.alternatives:
        lines = [superposition_flags(arm)]
        if arm.steps != steps:
            lines = launch_flags(plan, arm)
        console.print(f"\nInstead, {name}:\n\n  " + " \\\n  ".join(lines), highlight=False)
    _show_controls(plan, console)


def _show_controls(plan: Plan, console: Console) -> None:
    start = "To compare, train"
    if plan.recommended is not plan.tst:
        # The baselines would have nothing to be compared with.
        flags = " \\\n  ".join(launch_flags(plan, plan.tst))
        console.print(
            f"\nTo compare, train this run with superposition, for which the tokens suffice:\n\n"
            f"  {flags}",
            highlight=False,
        )
        start = "and"
    console.print(
        f"\n{start} baselines of these lengths, each with its own complete decay; a\n"
        "longer one that is read before its end would credit superposition with the decay:",
        highlight=False,
    )
    for name, arm in controls(plan):
        # Only the length is another one.
        lines = [line for line in launch_flags(plan, arm) if "--seq-length" not in line]
        console.print(f"\n  {name}:\n  " + " \\\n  ".join(lines), highlight=False)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    args = parse_arguments(arguments)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    if args.published:
        console.print(predictions_table())
        return 0
    check_json_path(args.json)
    request = read_request(args)
    with worded(FLAGS):
        plan = make_plan(request)
    if args.json is not None:
        write_json(args.json, plan_as_json(plan))
    show(plan, console)
    return 0
