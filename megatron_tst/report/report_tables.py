"""The tables of a report: every number that the plots show, and the settings behind them."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean

import numpy as np

from megatron_tst.common.text_table import Table
from megatron_tst.common.units import DASH, TIMES, duration, quantity
from megatron_tst.report import wording
from megatron_tst.report.compared_settings import differing
from megatron_tst.report.comparison import Study
from megatron_tst.report.decomposition import Gain
from megatron_tst.report.describing import Setting
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import ARMS, Pair
from megatron_tst.report.recovery import recovery_of
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import estimate
from megatron_tst.report.units import amount, gap_text, loss_text, ratio_text, signed
from megatron_tst.settings.phases import bags_name

_SIDE_BY_SIDE = 4


def groups_table(groups: Sequence[Group]) -> Table:
    """What each setting ended with and what it cost."""
    rows = [_group_row(group) for group in groups]
    header = (
        "Setting",
        "Runs",
        "Final validation loss (nats/token)",
        "Standard error",
        "Perplexity",
        "Equivalent tokens",
        "Data tokens",
        "Training time",
        "Time per step",
    )
    return Table(header, rows)


def _group_row(group: Group) -> tuple[str, ...]:
    runs, count = group.counted, len(group.runs)
    state = str(count)
    if group.diverged:
        state = f"{len(group.diverged)} of {count} diverged"
    elif runs and runs[0].status == "unfinished":
        state = f"{count}, unfinished"
    if not runs:
        return (group.label, state, *[DASH] * 7)
    loss = estimate([run.final_loss for run in runs])
    seconds = fmean(float(run.seconds[-1]) for run in runs)
    steps = fmean(int(run.steps[-1]) for run in runs)
    is_timed = bool(np.isfinite(seconds))
    return (
        group.label,
        state,
        loss_text(loss),
        DASH if loss.standard_error is None else f"{loss.standard_error:.4f}",
        f"{exp(loss.mean):.3f}",
        quantity(float(runs[0].equivalent_tokens[-1])),
        quantity(float(runs[0].data_tokens[-1])),
        duration(seconds) if is_timed else DASH,
        f"{seconds / steps * 1e3:.4g} ms" if is_timed else DASH,
    )


def matchups_table(matchups: Sequence[Matchup]) -> Table:
    """Each TST setting against its baseline."""
    header = (
        "Setting",
        "Gap at equal FLOPs (nats)",
        "Seeds",
        "Outcome",
        "Speed-up, read from one curve",
        "Speed-up, from finished runs",
        "Gap at equal data, from curves",
        "Gap at equal data, from finished runs",
        "Jump at the switch (nats)",
        "Steps from switch to crossing",
    )
    return Table(header, [_matchup_row(matchup) for matchup in matchups])


def _matchup_row(matchup: Matchup) -> tuple[str, ...]:
    gap = matchup.mean_of(lambda pair: pair.equal_budget("equivalent tokens").gap)
    if gap is None:
        lost = f"{len(matchup.tst.diverged)} of {len(matchup.tst.runs)} diverged"
        missing = "evaluated too seldom" if matchup.pairs else "no pair"
        reason = lost if matchup.tst.diverged else missing
        return (matchup.tst.label, DASH, "0", reason, *[DASH] * 6)
    off_curve = matchup.speed_up_off_curve("equivalent tokens")
    data = matchup.mean_of(lambda pair: pair.equal_budget("data tokens").gap)
    data_off_ends = matchup.equal_data_off_ends()
    jump = matchup.mean_of(lambda pair: pair.switch().jump)
    return (
        matchup.tst.label,
        gap_text(gap),
        str(gap.n),
        wording.result_of(matchup, gap),
        DASH if off_curve is None else ratio_text(off_curve),
        _off_ends(matchup),
        DASH if data is None else gap_text(data),
        DASH if data_off_ends is None else gap_text(data_off_ends),
        DASH if jump is None else gap_text(jump),
        recovery_of(matchup).text,
    )


def _off_ends(matchup: Matchup) -> str:
    found = matchup.speed_up_off_ends()
    if found is None:
        return DASH
    if found.estimate is not None:
        return ratio_text(found.estimate)
    bounds = (
        [f"> {found.longest:.3g}{TIMES} in {found.beyond} of {found.seeds}"] if found.beyond else []
    )
    bounds += (
        [f"< {found.shortest:.3g}{TIMES} in {found.below} of {found.seeds}"] if found.below else []
    )
    return " or ".join(bounds)


def gains_table(gains: Sequence[Gain]) -> Table:
    """What each TST setting gains on a longer baseline at the same step, in parts."""
    header = (
        "Setting",
        "Against, at the same step",
        "Gain (nats)",
        "of it the decay",
        "of it the bags",
        "Decay's share",
        "Speed-up read off the longer baseline",
        "the same for the control",
    )
    return Table(header, [_gain_row(gain) for gain in gains])


def _gain_row(gain: Gain) -> tuple[str, ...]:
    names = (gain.tst.label, gain.longer.label)
    if gain.not_separable:
        return (*names, f"not separable: {gain.not_separable}", *[DASH] * 5)
    share = gain.decay_share
    speed_ups = (gain.apparent_speed_up, gain.apparent_speed_up_of_control)
    return (
        *names,
        *map(gap_text, (gain.total, gain.decay, gain.bags)),
        DASH if share is None else f"{share:.0%}",
        *(DASH if found is None else ratio_text(found) for found in speed_ups),
    )


def equal_budget_table(pair: Pair, with_time: bool) -> Table:
    """Both arms of one pair after spending the same."""
    rows = []
    for name, budget in _budgets(with_time):
        reading = pair.equal_budget(budget)
        phase = bags_name(pair.tst.phases)
        phase = f" (TST in {phase})" if reading.tst_in_superposition else ""
        losses = (
            "not evaluated near" if loss is None else f"{loss:.4f}"
            for loss in (reading.baseline_loss, reading.tst_loss)
        )
        gap = DASH if reading.gap is None else signed(reading.gap)
        rows.append((f"{name}: {amount(budget, reading.amount)}{phase}", *losses, gap))
    return Table(("", "Baseline loss", "TST loss", "Gap (nats; + is TST ahead)"), rows)


def equal_loss_table(pair: Pair, with_time: bool) -> Table:
    """What both arms of one pair spent until they reached the final loss of either."""
    rows = []
    for _, budget in _budgets(with_time):
        if budget == "data tokens":
            continue
        for arm in ARMS:
            reading = pair.equal_loss(budget, arm)
            speed_up = reading.speed_up
            rows.append(
                (
                    f"Final loss of {arm} ({reading.target_loss:.4f})",
                    wording.cost(reading, "baseline"),
                    wording.cost(reading, "TST"),
                    DASH if speed_up is None else f"{speed_up:.2f}{TIMES}",
                )
            )
    return Table(("Target", "Baseline", "TST", "Speed-up of TST"), rows)


def _budgets(with_time: bool) -> list[tuple[str, Budget]]:
    found: list[tuple[str, Budget]] = [
        ("Equal FLOPs", "equivalent tokens"),
        ("Equal data", "data tokens"),
    ]
    return [*found, ("Equal training time", "seconds")] if with_time else found


def runs_table(groups: Sequence[Group]) -> Table:
    """Every run, averaged or not; what computed its loss, where that is known."""
    has_losses = any(run.loss_impl for group in groups for run in group.runs)
    rows = [
        (
            run.name,
            group.label,
            str(run.seed),
            run.status,
            f"{run.final_loss:.4f}",
            f"{run.steps[-1] if run.steps.size else 0} of {run.total_steps}",
            run.commit or DASH,
            run.machine or DASH,
            *([run.loss_impl or DASH] if has_losses else ()),
        )
        for group in groups
        for run in group.runs
    ]
    header = (
        "Run",
        "Setting",
        "Seed",
        "Status",
        "Last validation loss",
        "Steps",
        "Commit",
        "Machine",
        *(("Loss by",) if has_losses else ()),
    )
    return Table(header, rows)


def settings_table(study: Study) -> tuple[str, Table]:
    """Settings side by side; of many groups, what they have in common. A note comes first."""
    groups = study.groups
    settings = [{**group.settings, **_seeds(group)} for group in groups]
    names = list(dict.fromkeys(name for one in settings for name in one))
    apart = differing(settings)
    if len(groups) <= _SIDE_BY_SIDE:
        rows = [(name, *(_shown(one.get(name)) for one in settings)) for name in names]
        header = ("Setting", *(group.label for group in groups))
        return "Differences are highlighted.", Table(
            header, rows, tuple(name in apart for name in names)
        )
    common = [(name, _shown(settings[0].get(name))) for name in names if name not in apart]
    return f"Of all groups. They differ in {', '.join(apart)}.", Table(("Setting", "Value"), common)


def _seeds(group: Group) -> dict[str, Setting]:
    runs = [run for run in group.runs if "seed" in run.settings]
    return {"seeds": ", ".join(str(run.seed) for run in runs)} if runs else {}


def data_table(run: RunResult) -> Table:
    """The text, tokenizer and validation set."""
    return Table(("", ""), [(name, _shown(value)) for name, value in run.data.items()])


def _shown(value: Setting | None) -> str:
    if value is None:
        return DASH
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else str(value)
