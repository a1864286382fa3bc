"""Everything that can be known of a launch without its GPUs."""

from __future__ import annotations

import argparse
import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.common.platform import GPUS
from megatron_tst.data.budget import CorpusBudget
from megatron_tst.preflight import engine, misfits, model_checks, rank_simulation
from megatron_tst.preflight.connections_check import connection_findings
from megatron_tst.preflight.corpus_check import check_text, resolve_vocabulary
from megatron_tst.preflight.findings import Finding, error, warning
from megatron_tst.preflight.memory import GIB, Memory, checkpoint_bytes, phase_memory
from megatron_tst.preflight.model_size import BuiltModel, whole_model
from megatron_tst.preflight.optimizer_layout import misplaced_note
from megatron_tst.preflight.rank_parameters import RankParameters, rank_parameters
from megatron_tst.preflight.suspects import engine_note, suspects
from megatron_tst.preflight.torch_check import torch_findings
from megatron_tst.settings.argument_checks import argument_errors
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.batch_arguments import refuse_unusable_batch_sizes
from megatron_tst.settings.conflicts import refuse_conflicting_arguments
from megatron_tst.settings.schedule import SuperpositionSchedule


@dataclass(frozen=True)
class Launch:
    """What is to be checked.

    Attributes:
        argv: arguments of the training program.
        world_size: GPUs.
        gpu_bytes: memory of a GPU.
        ranks: to build and count; the first of each pipeline stage if there are none.
        tokenizer_ids: where the tokenizer is not on this machine.
        environment: of the training program, as far as Megatron looks at it; None if unknown.
    """

    argv: Sequence[str]
    world_size: int
    gpu_bytes: float
    ranks: Sequence[int] = ()
    tokenizer_ids: int | None = None
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class StageReport:
    """A rank and its memory.

    Attributes:
        rank: as which it was built.
        pipeline_rank: its stage.
        parameters: what it holds.
        memory: by phase, "phase 1" and so on, or "training" without superposition.
    """

    rank: int
    pipeline_rank: int
    parameters: RankParameters
    memory: dict[str, Memory]


@dataclass
class Report:
    """What was found; parts are None where an error came before.

    Attributes:
        findings: errors, warnings and assumptions.
        args: validated command line.
        schedule: phases of the run.
        model: the whole of it.
        stages: a report for each rank that was built.
        budgets: text of each corpus, where it is on this machine.
        alignment: power of two that divides all dimensions of the products of the layers.
    """

    findings: list[Finding] = field(default_factory=list)
    args: argparse.Namespace | None = None
    schedule: SuperpositionSchedule | None = None
    model: BuiltModel | None = None
    stages: list[StageReport] = field(default_factory=list)
    budgets: list[CorpusBudget] = field(default_factory=list)
    alignment: int = 1

    @property
    def has_errors(self) -> bool:
        """Whether the run must not be launched."""
        return any(finding.level == "error" for finding in self.findings)

    @property
    def flops_per_step(self) -> float:
        """FLOPs of a step at the batch size of the end, attention included."""
        assert self.args is not None
        assert self.schedule is not None
        assert self.model is not None
        length = self.args.seq_length
        batch = self.schedule.batch_sizes.size_at(self.schedule.total_steps)
        return batch * length * self.model.size(self.args).flops_per_token(length)

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint."""
        assert self.args is not None
        assert self.model is not None
        return checkpoint_bytes(self.args, self.model.total)


def check_launch(parser: argparse.ArgumentParser, launch: Launch) -> Report:
    """Parses, validates and builds a launch as its ranks would.

    The process must have called ``rank_simulation.assume_machine``.

    Args:
        parser: of ``rank_simulation.launch_parser``.
        launch: arguments and machine.
    """
    report = Report(misfits.removed_arguments(list(launch.argv)))
    if report.has_errors:
        return report
    try:
        args = rank_simulation.parse(parser, launch.argv, launch.world_size)
    except (UsageError, argparse.ArgumentError) as problem:
        report.findings.append(error(f"{problem} (Megatron's parser)."))
        return report
    report.findings.extend(misfits.unjudged_arguments(parser, args))
    _check_before_validation(report, args)
    report.findings.extend(connection_findings(args, launch.environment))
    if report.has_errors:
        return report
    given = _given(args, launch.argv)
    before = copy.copy(args)
    if not _attempt(report, lambda: rank_simulation.validate(args)):
        return report
    report.args = args
    report.findings.extend(_changes(before, args, given))
    if not _attempt(report, lambda: _read_schedule(report, args)):
        return report
    assert report.schedule is not None
    ids, notes = resolve_vocabulary(args, launch.tokenizer_ids)
    report.findings.extend(suspects(args, given, report.schedule))
    report.findings.extend(notes + model_checks.vocabulary_misfits(args, ids))
    _build(report, args, launch)
    report.budgets, found = check_text(args, report.schedule)
    report.findings.extend(found)
    installed = engine.engine_version() if engine.has_transformer_engine() else None
    report.findings.append(engine_note(installed, rank_simulation.ASSUMED_ENGINE_VERSION))
    return report


def _check_before_validation(report: Report, args: argparse.Namespace) -> None:
    report.findings.extend(map(error, argument_errors(args, GPUS)))
    if args.yaml_cfg is None and not (args.train_iters or args.train_samples):
        report.findings.append(error("--train-iters is not given: pass the steps of the run."))
    report.findings.extend(misfits.misfits(args))
    report.findings.extend(torch_findings(args))


def _read_schedule(report: Report, args: argparse.Namespace) -> None:
    # Validation resolves deprecated spellings.
    refuse_conflicting_arguments(args)
    report.schedule = superposition_schedule_from_args(args)
    refuse_unusable_batch_sizes(args, steps_done=0)


def _attempt(report: Report, action: Callable[[], Any]) -> bool:
    """Runs a check; what it raises becomes an error."""
    try:
        action()
    except ImportError as problem:
        # A library of the cluster, such as that of Mamba.
        report.findings.append(model_checks.not_built(" ".join(str(problem).split())))
        return False
    # Megatron reports by assertion, and its libraries by whatever they raise.
    except Exception as problem:
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        text = " ".join(str(problem).split()) or frame.line or type(problem).__name__
        is_own = isinstance(problem, UsageError)
        report.findings.append(error(text if is_own else f"Megatron refuses: {text}"))
        return False
    return True


def _given(args: argparse.Namespace, argv: Sequence[str]) -> set[str]:
    """Names of the arguments that the command line has, under their own name."""
    words = {w[2:].split("=", 1)[0].replace("-", "_") for w in argv if w.startswith("--")}
    return {name for name in vars(args) if name in words}


def _changes(
    before: argparse.Namespace, args: argparse.Namespace, given: set[str]
) -> list[Finding]:
    """Given arguments to which Megatron's validation gave another value, without an error.

    It removes old spellings, such as ``--recompute-activations``, once others stand for them.
    """

    def plain(value: Any) -> str:
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "fp8"}.get(
            str(value).removeprefix("torch."), str(value)
        )

    return [
        warning(
            f"--{name.replace('_', '-')} is {plain(getattr(before, name))}, and Megatron's "
            f"validation makes it {plain(getattr(args, name))}: the rest of the arguments does "
            "not allow it. Remove it, or what it clashes with."
        )
        for name in sorted(given & vars(args).keys())
        if plain(getattr(before, name)) != plain(getattr(args, name))
    ]


def _build(report: Report, args: argparse.Namespace, launch: Launch) -> None:
    """Builds one rank of each stage, and those that were asked for."""
    missing = model_checks.unbuildable(args)
    report.findings.extend(missing)
    if missing:
        return
    built: list[rank_simulation.Stage] = []
    ranks: list[int] = []

    def build() -> None:
        config = rank_simulation.build_configuration(args)
        rank_simulation.check_recipes(args, config)
        ranks.extend(rank_simulation.stage_ranks(args))
        wanted = dict.fromkeys([*ranks, *launch.ranks])
        built.extend(rank_simulation.build_stage(args, config, rank) for rank in wanted)
        report.model = whole_model(args, built[: len(ranks)])

    if not _attempt(report, build):
        return
    shown = [stage for stage in built if not launch.ranks or stage.rank in launch.ranks]
    report.stages = [_stage_report(report, args, stage) for stage in shown]
    report.alignment = model_checks.alignment(args, built)
    report.findings.extend(model_checks.empty_stages(shown) + model_checks.unmodelled(args))
    report.findings.extend(model_checks.unequal_shards(args, built[: len(ranks)]))
    # The same product may be on many stages.
    misaligned = [
        finding for stage in built for finding in model_checks.fp8_misalignments(args, stage)
    ]
    report.findings.extend(dict.fromkeys(misaligned))
    report.findings.extend(misplaced_note(args, built[: len(ranks)]))
    report.findings.extend(_memory_findings(report, launch.gpu_bytes))


def _stage_report(
    report: Report, args: argparse.Namespace, stage: rank_simulation.Stage
) -> StageReport:
    schedule = report.schedule
    assert schedule is not None
    parameters = rank_parameters(args, stage)
    ends = [*(phase.first_step for phase in schedule.phases[1:]), schedule.total_steps]
    memory = {
        f"phase {number}" if schedule.config.enabled else "training": phase_memory(
            args, stage, parameters, phase, schedule.batch_sizes.largest(phase.first_step, end)
        )
        for number, (phase, end) in enumerate(zip(schedule.phases, ends, strict=True), start=1)
    }
    return StageReport(stage.rank, stage.pipeline_rank, parameters, memory)


def _memory_findings(report: Report, gpu_bytes: float) -> list[Finding]:
    peaks = [
        (memory.total, phase, stage.rank)
        for stage in report.stages
        for phase, memory in stage.memory.items()
    ]
    most, phase, rank = max(peaks)
    where = (
        f"rank {rank} needs about {most / GIB:.0f} GiB in {phase}, and a GPU has "
        f"{gpu_bytes / GIB:.0f} GiB"
    )
    remedy = (
        "lower --micro-batch-size, use --tst-loss-impl linear, --recompute-granularity full, "
        "--use-distributed-optimizer or more model parallelism"
    )
    if most > gpu_bytes:
        return [error(f"{where} (--gpu-memory): {remedy}.")]
    if most > 0.9 * gpu_bytes:
        return [warning(f"{where}: the estimate is not that exact; {remedy}.")]
    return []
