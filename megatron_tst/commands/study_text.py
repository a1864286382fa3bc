"""Whether the text of a study suffices for its runs, before the first one starts."""

from __future__ import annotations

from argparse import Namespace

from megatron_tst.common.errors import UsageError
from megatron_tst.common.quiet import quiet_libraries
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.setting_fields import FLAGS, worded
from megatron_tst.study.asked_arguments import AskedArguments
from megatron_tst.study.config import MAX_EPOCHS, StudyConfig, StudyRun


def refuse_too_little_text(study: StudyConfig, asked: AskedArguments) -> None:
    """Refuses a study that has runs which would refuse their text when they start.

    Text that is not on this machine, and batch sizes that grow, are left to the runs.

    Args:
        study: runs that have ended may be among them.
        asked: the arguments of its runs.

    Raises:
        UsageError: naming the first of these runs, how many they are, and the ways out.
    """
    found: dict[object, list[str]] = {}
    errors: dict[object, str] = {}
    for run in study.runs():
        own = run.settings
        # What a run reads does not depend on the rest.
        alike = (own.model, own.total_steps, own.bag_size, own.changed)
        if alike not in found:
            problem = _problem(run, asked, study)
            if problem is not None:
                errors[alike] = problem
        found.setdefault(alike, []).append(run.name)
    if not errors:
        return
    refused = [name for alike in errors for name in found[alike]]
    shown = f"{', '.join(refused[:3])}{' ...' if len(refused) > 3 else ''}"
    text = next(iter(errors.values()))
    if MAX_EPOCHS in text:
        text += f" In a study file these are keys of an arm, and {MAX_EPOCHS} is under arguments."
    raise UsageError(f"{len(refused)} of {len(study.grid)} runs would be refused, {shown}: {text}")


def _problem(run: StudyRun, asked: AskedArguments, study: StudyConfig) -> str | None:
    # Here, because it imports Megatron, which takes seconds.
    quiet_libraries()
    from megatron_tst.preflight.corpus_check import check_text

    args = Namespace(**asked.of(run))
    if args.rampup_batch_size or args.global_batch_size is None:
        return None
    limit = study.arguments.get(MAX_EPOCHS)
    args.tst_max_epochs = None if limit is None else float(str(limit))
    with worded(FLAGS):
        schedule = SuperpositionSchedule(
            run.settings.superposition,
            run.settings.total_steps,
            BatchSizes.constant(args.global_batch_size),
            args.seq_length,
            seed=args.seed,
        )
    _, findings = check_text(args, schedule)
    return next((finding.text for finding in findings if finding.level == "error"), None)
