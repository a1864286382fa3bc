"""What a study is expected to take on GPUs: FLOPs by the preflight, at a speed that is assumed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tst.common.errors import UsageError
from megatron_tst.common.quiet import quiet_libraries
from megatron_tst.planning.accounting import PEAK_BF16_FLOPS, SECONDS_PER_HOUR
from megatron_tst.study.config import StudyConfig, StudyRun

# Forward only, of forward and backward.
_EVALUATION_SHARE = 1 / 3
# Of no influence on FLOPs; a fitting vocabulary is that of the tokenizer.
_ANY_MEMORY = 1e12


def expected_hours(study: StudyConfig, gpu: str, mfu: float, vocabulary: int | None) -> str:
    """Hours of one GPU for all runs, as a sentence that names what it assumes.

    Args:
        study: with one model or several.
        gpu: kind, of :data:`PEAK_BF16_FLOPS`.
        mfu: share of its dense bf16 peak, with everything that a step waits for.
        vocabulary: ids, where the tokenizer is not on this machine.

    Raises:
        UsageError: a number is out of range, or a run could not be started.
    """
    if gpu not in PEAK_BF16_FLOPS:
        raise UsageError(f"--gpu is {gpu!r}: use {', '.join(PEAK_BF16_FLOPS)}.")
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu is {mfu:g}: use a share above 0 and up to 1.")
    runs = study.runs()
    flops = study_flops(study, runs, vocabulary)
    hours = flops / (mfu * PEAK_BF16_FLOPS[gpu]) / SECONDS_PER_HOUR
    return (
        f"{flops:.3g} FLOPs: {hours:.1f} hours of one {gpu} at {mfu:.0%} of its dense bf16 peak, "
        "which is assumed, not measured"
    )


def study_flops(study: StudyConfig, runs: Sequence[StudyRun], vocabulary: int | None) -> float:
    """FLOPs of all steps and evaluations; a step with bags costs as much as one without."""
    by_model: dict[str, tuple[float, float]] = {}
    total = 0.0
    for run in runs:
        model = run.settings.model
        if model not in by_model:
            by_model[model] = _flops_of(study, run, vocabulary)
        step, token = by_model[model]
        evaluated = study.validation.times * study.validation.tokens
        total += run.settings.total_steps * step + evaluated * token * _EVALUATION_SHARE
    return total


def _flops_of(study: StudyConfig, run: StudyRun, vocabulary: int | None) -> tuple[float, float]:
    """FLOPs of a step, and of training on a token."""
    # These take seconds, and the other uses of the command need none of them.
    quiet_libraries()
    from megatron_tst import cpu
    from megatron_tst.preflight.engine_path import make_engine_importable

    make_engine_importable()
    cpu.activate()
    from megatron_tst.preflight import rank_simulation
    from megatron_tst.preflight.checks import Launch, check_launch

    rank_simulation.assume_machine((9, 0))
    launch = Launch(run.arguments, study.processes, _ANY_MEMORY, (), vocabulary)
    report = check_launch(rank_simulation.launch_parser(), launch)
    if report.has_errors or report.model is None or report.args is None:
        found = [finding.text for finding in report.findings if finding.level == "error"]
        raise UsageError(f"{run.name}: {' '.join(found)}")
    length = report.args.seq_length
    return report.flops_per_step, report.model.size(report.args).flops_per_token(length)
