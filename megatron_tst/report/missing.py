"""What cannot be said of a set of runs, for want of a baseline."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tst.common.units import DASH
from megatron_tst.report.compared_settings import LENGTH_SETTINGS, SUPERPOSITION_SETTINGS, differing
from megatron_tst.report.comparison import Study
from megatron_tst.report.describing import NUMERICS, Setting
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import Pair


def missing_controls(study: Study) -> Iterator[str]:
    """A sentence for each comparison that has no control."""
    baselines = [group for group in study.groups if group.is_baseline]
    if study.alone and not baselines:
        labels = ", ".join(group.label for group in study.alone)
        yield f"There is no baseline among these runs: what {labels} gain cannot be said."
    elif study.alone:
        yield from (_without_control(group, baselines) for group in study.alone)
    for matchup in study.matchups:
        yield from _without_seeds(matchup)
    lengths = {group.total_steps for group in baselines if group.counted}
    if study.ranked and len(lengths) == 1:
        yield (
            "All baselines have one length: how long one must train to end as low as TST cannot be "
            "said, nor which part of a gain on a longer one is its decay."
        )


def _without_control(tst: Group, baselines: list[Group]) -> str:
    apart = _apart(tst, nearest_baseline(tst, baselines))
    return (
        f"{tst.label} has no baseline of the same settings and length: the nearest differs in "
        f"{', '.join(apart)}. What it gains cannot be said."
    )


def nearest_baseline(tst: Group, baselines: list[Group]) -> Group:
    """The baseline that differs from a group in the fewest settings."""
    return min(baselines, key=lambda baseline: len(_apart(tst, baseline)))


def _apart(tst: Group, baseline: Group) -> list[str]:
    """In which settings two groups differ, with both values; a length is one of them."""
    is_as_long = tst.total_steps == baseline.total_steps
    scaled = () if is_as_long else {*LENGTH_SETTINGS} - {"total_steps"}
    left_out = {*SUPERPOSITION_SETTINGS, *scaled}
    names = [n for n in differing([tst.settings, baseline.settings]) if n not in left_out]

    def value(group: Group, name: str) -> Setting:
        tells = name not in NUMERICS and all(run.arguments for run in group.runs)
        return group.settings.get(name, DASH if tells else "not recorded")

    return [f"{n} ({value(baseline, n)} instead of {value(tst, n)})" for n in names]


def _without_seeds(matchup: Matchup) -> Iterator[str]:
    paired = {pair.tst.seed for pair in matchup.pairs}
    alone = [str(run.seed) for run in matchup.tst.counted if run.seed not in paired]
    if alone:
        yield (
            f"{matchup.tst.label} has no finished baseline of seed {', '.join(alone)}: "
            f"{'that run is' if len(alone) == 1 else 'those runs are'} in no gap."
        )
    yield from _of_some_seeds(matchup, "a speed-up", matchup.pairs_with_lengths)
    as_long = [pair for pair in matchup.pairs if matchup.loss_at_equal_data(pair) is not None]
    yield from _of_some_seeds(matchup, "a gap at equal data", as_long)


def _of_some_seeds(matchup: Matchup, what: str, pairs: list[Pair]) -> Iterator[str]:
    """Names the seeds that lack the baselines for what is read off finished runs."""
    if 0 < len(pairs) < len(matchup.pairs):
        lacking = [str(pair.tst.seed) for pair in matchup.pairs if pair not in pairs]
        yield (
            f"{matchup.tst.label} lacks longer baselines of seed {', '.join(lacking)}: {what} from "
            f"finished runs is of {len(pairs)} of {len(matchup.pairs)} seeds."
        )
