"""A plan as tables, flags and JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from megatron_tst.common.units import DASH, quantity
from megatron_tst.planning.advisor import Plan
from megatron_tst.planning.arms import Arm
from megatron_tst.planning.evidence import ABOUT_OUTPUT_ONLY, SOURCES
from megatron_tst.planning.limits import SHORTEST_PUBLISHED_STEPS, describe, warnings
from megatron_tst.planning.loss_estimate import Estimate
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.phases import bags_of
from megatron_tst.settings.variants import OUTPUT_ONLY

FORMAT = "megatron-tst plan 2"

_WARMUP_STEPS = 2000
# Documents are split, not tokens: the train split holds a little more or less than its share.
_SPLIT_ROUNDING = 0.01
_COLUMNS = (
    "comparison",
    "run",
    "steps (phase 1 + 2)",
    "equivalent",
    "data",
    "epochs",
    "GPU-hours",
    "days",
    "cost",
    "loss",
)


def plan_table(plan: Plan) -> Table:
    """The recommendation, the alternatives and the comparisons, a run a row, as Markdown."""
    table = Table(*_COLUMNS, box=box.MARKDOWN)
    table.add_row("recommended", describe(plan.recommended), *_cells(plan.recommended))
    for name, arm in plan.alternatives:
        table.add_row(f"instead: {name}", describe(arm), *_cells(arm))
    for comparison in plan.comparisons:
        table.add_row(comparison.name, "baseline", *_cells(comparison.baseline))
        table.add_row("", describe(plan.tst), *_cells(comparison.tst))
    return table


def outside_notes(plan: Plan) -> list[str]:
    """Why losses of the table are extrapolated; empty if none is."""
    return list(dict.fromkeys(note for arm in _arms(plan) for note in arm.loss.outside))


def evidence(plan: Plan) -> list[str]:
    """Where losses and advice of a plan are from, in sentences."""
    offered = {arm.schedule.config.variant for _, arm in plan.alternatives}
    return [SOURCES, *([ABOUT_OUTPUT_ONLY] if OUTPUT_ONLY.name in offered else [])]


def controls(plan: Plan) -> list[tuple[str, Arm]]:
    """The baselines that ``plan.tst`` is compared with, and for what.

    Each has a complete decay of its own. A longer baseline that is read before its end loses to any
    run that has ended, with bags or without.
    """
    found: dict[int, tuple[str, Arm]] = {}
    for name, baseline, tst in plan.comparisons:
        if baseline is None or tst is not plan.tst:
            continue
        names = [found[baseline.steps][0]] if baseline.steps in found else []
        found[baseline.steps] = (", ".join([*names, name]), baseline)
    return list(found.values())


def launch_flags(plan: Plan, arm: Arm) -> list[str]:
    """Arguments of a run of the plan for ``python -m megatron_tst.pretrain``, a line each."""
    request = plan.request
    warmup = _WARMUP_STEPS
    if arm.steps < SHORTEST_PUBLISHED_STEPS:
        warmup = arm.steps * _WARMUP_STEPS // SHORTEST_PUBLISHED_STEPS
    lines = [
        f"--seq-length {request.sequence_length} --global-batch-size {request.global_batch_size}",
        f"--train-iters {arm.steps}",
        f"--lr {plan.reference.learning_rate:g} --min-lr 0 --lr-warmup-iters {warmup}",
        f"--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {arm.steps // 10}",
    ]
    lines.append(f"--split {request.split}")
    return [*lines, superposition_flags(arm)]


def superposition_flags(arm: Arm) -> str:
    """The ``--tst-*`` arguments of a run."""
    config = arm.schedule.config
    flags = ["--tst-bag-size 1"]
    if config.enabled:
        flags = [f"--tst-bag-size {config.bag_size} --tst-steps {arm.phase_steps[0]}"]
    if arm.schedule.bags:
        sizes = ",".join(f"{size}:{steps}" for size, steps in arm.schedule.bags)
        flags = [f"--tst-schedule {sizes}"]
    if config.bag_sizes is not None:
        flags = [f"--tst-bag-sizes {config.bag_sizes} --tst-steps {arm.phase_steps[0]}"]
    for name in ("variant", "loss_impl"):
        known, value = SETTINGS[name], getattr(config, name)
        if value != known.default:
            flags.append(f"{known.flag} {value}")
    if config.enabled and arm.epochs > 1 - _SPLIT_ROUNDING:
        flags.append(f"--tst-max-epochs {max(arm.epochs, 1) * (1 + _SPLIT_ROUNDING):.3f}")
    return " ".join(flags)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Everything that is printed, as plain values."""
    request, cluster = plan.request, plan.request.cluster
    return {
        "format": FORMAT,
        "request": {
            "model": request.size.name,
            "parameters": request.size.parameters,
            "gpus": cluster.gpus,
            "tokens_per_second_per_gpu": cluster.tokens_per_second,
            "gpu_hours": request.gpu_hours,
            "price_per_gpu_hour": cluster.price_per_gpu_hour,
            "tokens": request.tokens,
            "split": request.split,
            "max_epochs": request.max_epochs,
            "global_batch_size": request.global_batch_size,
            "sequence_length": request.sequence_length,
        },
        "losses": request.losses,
        "limit": plan.limit,
        "reason": plan.reason,
        "recommended": arm_as_json(plan.recommended),
        "flags": " ".join(launch_flags(plan, plan.recommended)).split(),
        "alternatives": [{"name": name, **_launched(plan, arm)} for name, arm in plan.alternatives],
        "comparisons": [
            {
                "name": comparison.name,
                "baseline": comparison.baseline and arm_as_json(comparison.baseline),
                "tst": comparison.tst and arm_as_json(comparison.tst),
            }
            for comparison in plan.comparisons
        ],
        "compared": _launched(plan, plan.tst),
        "controls": [{"compared_at": name, **_launched(plan, arm)} for name, arm in controls(plan)],
        "evidence": evidence(plan),
        "warnings": warnings(plan),
    }


def _launched(plan: Plan, arm: Arm) -> dict[str, Any]:
    return {"flags": " ".join(launch_flags(plan, arm)).split(), **arm_as_json(arm)}


def arm_as_json(arm: Arm) -> dict[str, Any]:
    """A run as plain values; the loss with its range and what it is extrapolated from."""
    config = arm.schedule.config
    return {
        "variant": config.variant if config.enabled else "baseline",
        "bag_size": config.bag_size,
        "bag_sizes": config.bag_sizes,
        "bags": [list(pair) for pair in bags_of(arm.schedule.phases)],
        "step_ratio": arm.step_ratio,
        "steps": arm.steps,
        "phase_1_steps": arm.phase_steps[0],
        "phase_2_steps": arm.phase_steps[1],
        "equivalent_tokens": arm.equivalent_tokens,
        "data_tokens": arm.data_tokens,
        "epochs": arm.epochs,
        "fits_text": arm.fits_text,
        "gpu_hours": arm.gpu_hours,
        "days": arm.days,
        "cost": arm.cost,
        "loss": {
            "value": arm.loss.value,
            "low": arm.loss.low,
            "high": arm.loss.high,
            "extrapolated": bool(arm.loss.outside),
            "outside": list(arm.loss.outside),
        },
    }


def _arms(plan: Plan) -> list[Arm]:
    compared = [arm for comparison in plan.comparisons for arm in comparison[1:] if arm]
    return [plan.recommended, *(arm for _, arm in plan.alternatives), *compared]


def _cells(arm: Arm | None) -> list[str]:
    if arm is None:
        return ["not within reach", *[""] * (len(_COLUMNS) - 3)]
    return [
        " + ".join(str(steps) for steps in arm.phase_steps if steps),
        quantity(arm.equivalent_tokens),
        quantity(arm.data_tokens),
        f"{arm.epochs:.2f}" + ("" if arm.fits_text else " (too many)"),
        f"{arm.gpu_hours:,.0f}",
        f"{arm.days:.3g}",
        "" if arm.cost is None else f"{arm.cost:,.0f}",
        _loss(arm.loss),
    ]


def _loss(loss: Estimate) -> str:
    if loss.outside:
        return f"~{loss.value:.2f} ({loss.low:.2f} {DASH} {loss.high:.2f}) *"
    return f"{loss.value:.3f} ({loss.low:.3f} {DASH} {loss.high:.3f})"
