"""What a reader must know before trusting a verdict, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_tst.report.comparison import Study
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import LARGEST_TIME_SPREAD, Matchup
from megatron_tst.report.missing import missing_controls
from megatron_tst.report.statistics import FEWEST_SEEDS
from megatron_tst.report.unchecked import unchecked
from megatron_tst.report.units import seeds
from megatron_tst.report.wording import result_of
from megatron_tst.settings.phases import phase_at, phase_name


def cautions(study: Study) -> list[str]:
    """What a reader must know before trusting the verdict."""
    found: list[str] = []
    if study.ranked:
        found += _cautions_on_seeds(study)
    for group in study.groups:
        found += _cautions_on_runs(group)
    found += missing_controls(study)
    found += unchecked(study)
    for matchup in study.matchups:
        found += _cautions_on_arms(matchup)
    spread = max((matchup.time_spread for matchup in study.matchups), default=1.0)
    if spread > LARGEST_TIME_SPREAD:
        found.append(
            f"A step took up to {spread:.1f} times as long in one run of an arm as in another: the "
            "machine was shared, and their times are not compared."
        )
    return list(dict.fromkeys(found))


def _cautions_on_seeds(study: Study) -> Iterable[str]:
    counts = [len(matchup.pairs) for matchup in study.ranked]
    few = [m for m in study.ranked if len(m.pairs) < FEWEST_SEEDS]
    if max(counts) == 1:
        yield "One seed; no interval: a second seed may move the gap."
    elif few:
        named = ", ".join(f"{m.tst.label} ({seeds(len(m.pairs))})" for m in few)
        yield f"Too few seeds to decide anything, fewer than {FEWEST_SEEDS}: {named}."
    if len(study.picked_from) > 1:
        yield (
            f"The best of {len(study.picked_from)} settings was picked by the gap itself: "
            "expect a smaller one from new seeds."
        )
    if study.best:
        yield from _cautions_on_tuning(study, study.best)
    undecided = [m.tst.label for m in study.ranked if m.gap and result_of(m, m.gap) == "undecided"]
    if undecided:
        yield f"Undecided, the interval of the gap holds zero: {', '.join(undecided)}."


def _cautions_on_tuning(study: Study, best: Matchup) -> Iterable[str]:
    own = best.baseline
    lower = study.lower_baselines(best)
    as_many = study.lower_baselines(best, len(own.counted))
    for groups, words in (
        (as_many, ": the gap is not one to the best baseline that was trained."),
        (
            [group for group in lower if group not in as_many],
            ", by fewer seeds: the gap to a baseline that is tuned by as many may be smaller.",
        ),
    ):
        if groups:
            names = ", ".join(f"{group.label} ({seeds(len(group.counted))})" for group in groups)
            yield f"{names} ended lower than {own.label} ({seeds(len(own.counted))}){words}"


def _cautions_on_runs(group: Group) -> Iterable[str]:
    if group.diverged:
        names = ", ".join(run.name for run in group.diverged)
        yield (
            f"{len(group.diverged)} of {len(group.runs)} runs of {group.label} diverged and are in "
            f"no mean: {names}."
        )
    for run in group.runs:
        if run.status != "unfinished":
            continue
        last = int(run.steps[-1]) if run.steps.size else 0
        use = "" if run in group.counted else "; it is in no mean"
        yield (
            f"{run.name} was last evaluated at step {last} of {run.total_steps}: its learning rate "
            f"had not finished its decay{use}."
        )
        done = max(last - 1, 0)  # the last step that it did, counted from zero
        if phase_at(run.phases, done).is_superposed:
            yield (
                f"{run.name} was stopped in {phase_name(run.phases, done)}: it is not an ordinary "
                "language model yet, and the verdict is not one about the method."
            )


def _cautions_on_arms(matchup: Matchup) -> Iterable[str]:
    if matchup.differences:
        yield (
            f"The arms differ in more than superposition: {', '.join(matchup.differences)}. "
            "The gap cannot be put down to superposition alone."
        )
    runs = [run for pair in matchup.pairs for run in (pair.baseline, pair.tst)]
    if len({run.commit for run in runs}) > 1:
        yield "The arms were trained with different commits."
    if len({run.machine for run in runs}) > 1:
        yield "The arms were trained on different machines: times cannot be compared."
    if len(matchup.losses) > 1:
        found = ", ".join(sorted(loss or "unknown" for loss in matchup.losses))
        yield (
            f"Losses were computed by different kernels ({found}): times cannot be compared, and "
            "are those of the kernels as much as of the method (--tst-loss-impl)."
        )
    if any(not run.data for run in runs):
        yield (
            "Which corpus, tokenizer and validation set the runs had is not recorded: that they "
            "are the same was not checked."
        )
