"""A preflight report as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from megatron_tst.common.units import quantity
from megatron_tst.preflight.checks import Report
from megatron_tst.preflight.memory import ALLOWANCE_BYTES, GIB
from megatron_tst.settings.losses import losses_of_run
from megatron_tst.settings.schedule import SuperpositionSchedule

_MEMORY_LINES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations (estimate)",
    "logits": "logits and loss (estimate)",
    "inputs": "tokens and embedding (estimate)",
}


def summary_lines(report: Report) -> list[str]:
    """Model, run and layout, in a line each; none where an error came before."""
    args, schedule, model = report.args, report.schedule, report.model
    if args is None or schedule is None or model is None:
        return []
    steps = schedule.total_steps
    per_rank = " / ".join(f"{stage.parameters.weights:,}" for stage in report.stages)
    lines = [
        f"model        {model.total:,} parameters; {model.active:,} active, "
        f"{model.active_without_embeddings:,} without embedding and output layer"
        + (f", {model.multi_token:,} for multi-token prediction" if model.multi_token else ""),
        f"per rank     {per_rank} parameters ({_ranks(report)})",
        f"layout       {_layout(report)}",
        f"batch        {schedule.batch_sizes.size_at(steps):,} sequences of {args.seq_length:,}, "
        f"micro-batches of {args.micro_batch_size}",
        f"precision    {_precision(report)}",
        f"FLOPs        {report.flops_per_step:.3g} a step, attention included; "
        f"{report.flops_per_step / args.world_size:.3g} a GPU",
    ]
    if schedule.config.enabled:
        lines += _phase_lines(schedule)
    losses = losses_of_run(args, has_gpu=True)
    lines.append("loss         " + ", ".join(f"{kind}: {loss}" for kind, loss in losses.items()))
    lines.append(
        f"data         {quantity(schedule.data_tokens(steps))} tokens in {steps:,} steps "
        f"({quantity(schedule.equivalent_tokens(steps))} equivalent)"
    )
    lines += [
        f"corpus       {budget.path}: {budget.available:,} tokens, {budget.epochs:.3g} epochs"
        for budget in report.budgets
    ]
    lines.append(f"checkpoint   {_checkpoints(report)}")
    return lines


def _phase_lines(schedule: SuperpositionSchedule) -> Iterator[str]:
    ends = [phase.first_step for phase in schedule.phases[1:]] + [schedule.total_steps]
    for number, (phase, end) in enumerate(zip(schedule.phases, ends, strict=True), start=1):
        text = quantity(schedule.data_tokens(end) - schedule.data_tokens(phase.first_step))
        sizes = (schedule.config.bag_sizes or str(phase.bag_size)).replace(",", " or ")
        read = f", s = {sizes}: {text} tokens" if phase.is_superposed else f": {text}"
        yield f"phase {number}      steps {phase.first_step:,} to {end - 1:,}{read}"


def _ranks(report: Report) -> str:
    named = ", ".join(str(stage.rank) for stage in report.stages)
    return f"rank{'s' if len(report.stages) > 1 else ''} {named}"


def _layout(report: Report) -> str:
    args = report.args
    assert args is not None
    parts = [
        f"tensor {args.tensor_model_parallel_size}",
        f"pipeline {args.pipeline_model_parallel_size}",
        f"context {args.context_parallel_size}",
        f"data {args.data_parallel_size}",
    ]
    if args.virtual_pipeline_model_parallel_size:
        parts.insert(2, f"virtual {args.virtual_pipeline_model_parallel_size}")
    if args.num_experts:
        parts.append(f"experts {args.expert_model_parallel_size}")
    return ", ".join(parts)


def _precision(report: Report) -> str:
    args = report.args
    assert args is not None
    name = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    if args.fp8:
        name = f"{args.fp8_recipe} ({args.fp8}) over {name}"
    return f"{name}; dimensions of the products are multiples of {report.alignment}"


def _checkpoints(report: Report) -> str:
    args, schedule = report.args, report.schedule
    assert args is not None
    assert schedule is not None
    size = f"{report.checkpoint_bytes / 1e9:.4g} GB"
    if not (args.save and args.save_interval):
        return size
    count = -(-schedule.total_steps // args.save_interval)
    # Those of the switches come besides.
    count += sum(phase.first_step % args.save_interval != 0 for phase in schedule.phases)
    whole = f"{count * report.checkpoint_bytes / 1e12:.3g} TB"
    return f"{size}; {count:,} of them, if none is deleted, {whole}"


def memory_table(report: Report, gpu_bytes: float) -> Table:
    """Memory of each rank in each phase, in GiB."""
    table = Table("GiB a GPU", box=box.SIMPLE_HEAD)
    columns = [
        (stage, phase, memory) for stage in report.stages for phase, memory in stage.memory.items()
    ]
    for stage, phase, _ in columns:
        table.add_column(f"rank {stage.rank}, {phase}", justify="right")
    for part, line in _MEMORY_LINES.items():
        table.add_row(line, *(f"{getattr(m, part) / GIB:.2f}" for _, _, m in columns))
    table.add_row("allowance (fixed)", *(f"{ALLOWANCE_BYTES / GIB:.2f}" for _ in columns))
    table.add_row(
        f"total, of {gpu_bytes / GIB:.0f}", *(f"{m.total / GIB:.1f}" for *_, m in columns)
    )
    return table


def finding_lines(report: Report) -> list[str]:
    """Errors first, then warnings, then notes, and how many of the former."""
    lines = [
        f"{finding.level}: {finding.text}"
        for level in ("error", "warning", "note")
        for finding in report.findings
        if finding.level == level
    ]
    counts = [sum(f.level == level for f in report.findings) for level in ("error", "warning")]
    return [*lines, f"errors: {counts[0]}, warnings: {counts[1]}"]


def report_as_json(report: Report, gpu_bytes: float) -> dict[str, Any]:
    """Everything that is printed, as numbers."""
    found: dict[str, Any] = {
        "format": "megatron-tst preflight 1",
        "fits": not report.has_errors,
        "torch": torch.__version__,
        "findings": [asdict(finding) for finding in report.findings],
    }
    args, schedule, model = report.args, report.schedule, report.model
    if args is None or schedule is None or model is None:
        return found
    steps, switch = schedule.total_steps, schedule.switch_step
    return found | {
        "phases": [phase.record() for phase in schedule.phases],
        "world_size": args.world_size,
        "parameters": {
            "total": model.total,
            "active": model.active,
            "active_without_embeddings": model.active_without_embeddings,
        },
        "flops_per_step": report.flops_per_step,
        "steps": steps,
        "switch_step": switch,
        "data_tokens": {
            "phase_1": schedule.data_tokens(switch),
            "all": schedule.data_tokens(steps),
            "equivalent": schedule.equivalent_tokens(steps),
        },
        "checkpoint_bytes": report.checkpoint_bytes,
        "gpu_bytes": gpu_bytes,
        "corpora": [{**asdict(budget), "epochs": budget.epochs} for budget in report.budgets],
        "ranks": [
            {
                "rank": stage.rank,
                "pipeline_rank": stage.pipeline_rank,
                "parameters": asdict(stage.parameters),
                "memory_bytes": {
                    phase: {**asdict(memory), "allowance": ALLOWANCE_BYTES, "total": memory.total}
                    for phase, memory in stage.memory.items()
                },
            }
            for stage in report.stages
        ],
    }
