"""The arithmetic of a comparison over seeds, on curves with known answers."""

from __future__ import annotations

import re
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_tst.report.cautions import cautions
from megatron_tst.report.comparison import match_two, matchups_of, study_of
from megatron_tst.report.families import families_of
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.missing import missing_controls
from megatron_tst.report.pairs import Pair
from megatron_tst.report.plots import captions
from megatron_tst.report.readings import is_dense
from megatron_tst.report.recovery import recovery_of
from megatron_tst.report.report_tables import matchups_table
from megatron_tst.report.results import RunResult
from megatron_tst.report.statistics import estimate, estimate_ratio, t_probability, t_quantile
from megatron_tst.report.sweep import largest_sweep
from megatron_tst.report.tuning import tuned_arms
from megatron_tst.report.wording import cost, outcome, switch_sentence, verdict
from megatron_tst.study.study_file import read_study
from tests.studies import study_content, write_study
from tests.unit.synthetic_runs import TOKENS_PER_STEP, synthetic_run


def falling(total_steps: int, end: float, slope: float = 0.03):
    """A straight line that reaches ``end`` at the last step."""
    return lambda step: end + slope * (total_steps - step)


def matchup_of(runs: list[RunResult]) -> Matchup:
    (family,) = families_of(runs)
    (matchup,), alone = matchups_of(family)
    assert not alone
    return matchup


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 100])
def test_student_t_is_that_of_scipy(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    expected = stats.t.cdf(1.3, degrees) - stats.t.cdf(-1.3, degrees)
    assert t_probability(1.3, degrees) == pytest.approx(expected, rel=1e-12)


def test_an_estimate_has_the_interval_of_the_textbook() -> None:
    found = estimate([1.0, 2.0, 3.0])
    # Standard deviation 1; t of 2 degrees of freedom is 4.3027.
    assert found.mean == 2.0
    assert found.standard_error == pytest.approx(1 / sqrt(3))
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.3027 / sqrt(3), 2 + 4.3027 / sqrt(3)), 1e-4
    )
    assert found.excludes(-0.5)
    assert not found.excludes(0.0)


def test_one_value_has_no_interval_and_decides_nothing() -> None:
    found = estimate([5.0])
    assert (found.mean, found.low, found.high, found.standard_error) == (5.0, None, None, None)
    assert not found.excludes(0.0)


def test_a_ratio_is_averaged_in_logarithms() -> None:
    found = estimate_ratio([1.0, 4.0])
    assert found.mean == pytest.approx(2.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low * found.high == pytest.approx(4.0)


def test_paired_differences_are_free_of_what_a_seed_does_to_both_arms() -> None:
    runs = []
    for seed, (shift, gap) in enumerate([(0.0, 0.15), (0.5, 0.2), (-0.4, 0.25)]):
        runs.append(synthetic_run(falling(100, 3.0 + shift), seed=seed))
        runs.append(synthetic_run(falling(100, 3.0 + shift - gap), bag_size=4, seed=seed))
    found = matchup_of(runs).gap
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(t_quantile(2) * 0.05 / sqrt(3))
    assert found.excludes(0.0)


@pytest.mark.parametrize(("slowest", "is_compared"), [(1.05, True), (1.5, False)])
def test_times_of_a_shared_machine_are_not_compared(slowest: float, is_compared: bool) -> None:
    runs = []
    for seed, pace in enumerate((1.0, slowest)):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed, seconds_per_step=0.5))
        tst = falling(100, 2.9)
        runs.append(synthetic_run(tst, bag_size=4, seed=seed, seconds_per_step=pace))
    (study,) = [study_of(family) for family in families_of(runs)]
    assert matchup_of(runs).time_spread == pytest.approx(slowest)
    assert any("equal training time" in line for line in verdict(study)) == is_compared
    said = [line for line in cautions(study) if "their times are not compared" in line]
    assert len(said) == (not is_compared)
    assert all("1.5 times as long" in line for line in said)


def test_seeds_of_one_arm_alone_make_no_pair() -> None:
    runs = [synthetic_run(falling(100, 3.0), seed=seed) for seed in (0, 1)]
    runs += [synthetic_run(falling(100, 2.9), bag_size=4, seed=seed) for seed in (1, 2)]
    assert [pair.tst.seed for pair in matchup_of(runs).pairs] == [1]


def test_a_diverged_run_is_kept_and_not_averaged() -> None:
    runs = [synthetic_run(falling(100, 3.0), seed=seed) for seed in (0, 1, 2)]
    runs += [synthetic_run(falling(100, 2.9), bag_size=4, seed=seed) for seed in (0, 1)]
    runs.append(synthetic_run(lambda step: 50.0, bag_size=4, seed=2, status="diverged"))
    matchup = matchup_of(runs)
    assert matchup.gap is not None
    assert matchup.gap.n == 2
    assert matchup.gap.mean == pytest.approx(0.1)
    assert [run.seed for run in matchup.tst.diverged] == [2]
    assert len(matchup.tst.runs) == 3


def test_unfinished_runs_count_only_where_nothing_is_finished() -> None:
    early = synthetic_run(falling(100, 9.0), seed=1, status="unfinished")
    (family,) = families_of([synthetic_run(falling(100, 3.0)), early])
    assert [run.seed for run in family.groups[0].counted] == [0]
    (family,) = families_of([early])
    assert [run.seed for run in family.groups[0].counted] == [1]


def test_equal_budgets_are_read_where_the_cheaper_run_ends() -> None:
    baseline = synthetic_run(falling(100, 3.0))
    tst = synthetic_run(falling(100, 2.0), bag_size=4, seconds_per_step=1.0)
    pair = Pair(baseline, tst)
    flops = pair.equal_budget("equivalent tokens")
    assert flops.amount == 100 * TOKENS_PER_STEP
    assert flops.gap == pytest.approx(1.0)
    # TST has read the baseline's 1600 tokens after its 25 steps of phase 1. Its curve is read in
    # data tokens between validations at step 20 (1280) and 30 (1680): 0.8 of the way.
    data = pair.equal_budget("data tokens")
    assert data.amount == 1600
    assert data.tst_loss == pytest.approx(2.0 + 0.03 * (80 - 0.8 * 10))
    # All of phase 1 and no step behind it.
    assert data.tst_in_superposition
    # The baseline takes 50 s, in which TST does 50 steps.
    assert pair.equal_budget("seconds").tst_loss == pytest.approx(2.0 + 0.03 * 50)


def test_speed_up_off_one_curve() -> None:
    # TST passes 3.0, the baseline's end, 10 steps before its own end at 2.7.
    pairs = [
        synthetic_run(falling(100, end), bag_size=size, seed=seed)
        for seed in (0, 1)
        for size, end in ((1, 3.0), (4, 2.7))
    ]
    found = matchup_of(pairs).speed_up_off_curve("equivalent tokens")
    assert found is not None
    assert found.mean == pytest.approx(100 / 90)
    assert found.high == pytest.approx(100 / 90)


def test_speed_up_off_one_curve_when_tst_lost() -> None:
    runs = [synthetic_run(falling(100, 2.7)), synthetic_run(falling(100, 3.0), bag_size=4)]
    found = matchup_of(runs).speed_up_off_curve("equivalent tokens")
    assert found is not None
    assert found.mean == pytest.approx(0.9)


def scaling(lengths: list[int], seed: int, shift: float = 0.0) -> list[RunResult]:
    """Baselines whose final loss is 3 - 0.5 ln(length / 100), with curves far above it before."""
    return [
        synthetic_run(
            falling(steps, 3.0 + shift - 0.5 * log(steps / 100), slope=1.0),
            total_steps=steps,
            seed=seed,
            every=25,
        )
        for steps in lengths
    ]


def test_speed_up_off_finished_runs_interpolates_over_the_logarithm_of_the_length() -> None:
    runs = []
    for seed, speed_up in enumerate((1.2, 1.8)):
        runs += scaling([100, 150, 200], seed, shift=seed)
        end = 3.0 + seed - 0.5 * log(speed_up)
        runs.append(synthetic_run(falling(100, end), bag_size=4, seed=seed))
    matchup = matchup_of(runs)
    found = matchup.speed_up_off_ends()
    assert found is not None
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(sqrt(1.2 * 1.8))
    assert (found.shortest, found.longest, found.lengths) == (1.0, 2.0, 3)
    reach = t_quantile(1) * abs(log(1.8 / 1.2)) / 2
    assert found.estimate.high == pytest.approx(sqrt(1.2 * 1.8) * exp(reach))


@pytest.mark.parametrize(("end", "beyond", "below"), [(2.0, 1, 0), (3.5, 0, 1)])
def test_speed_up_is_not_extrapolated(end: float, beyond: int, below: int) -> None:
    runs = [*scaling([100, 200], 0), synthetic_run(falling(100, end), bag_size=4)]
    found = matchup_of(runs).speed_up_off_ends()
    assert found is not None
    assert found.estimate is None
    assert (found.beyond, found.below) == (beyond, below)


def test_a_seed_of_one_length_is_left_out_of_what_finished_runs_say_and_named() -> None:
    runs = [*scaling([100, 200], 0), *scaling([100], 1)]
    # s=4 and r=0.25 read 1.75 times the text.
    ends = {0: 3.0 - 0.5 * log(1.5), 1: 2.0}
    runs += [synthetic_run(falling(100, end), bag_size=4, seed=seed) for seed, end in ends.items()]
    matchup = matchup_of(runs)
    speed_up, equal_data = matchup.speed_up_off_ends(), matchup.equal_data_off_ends()
    assert speed_up is not None
    assert speed_up.estimate is not None
    assert speed_up.estimate.mean == pytest.approx(1.5)
    assert speed_up.seeds == 1
    assert equal_data is not None
    assert equal_data.n == 1
    assert len(matchup.pairs) == 2
    (study,) = [study_of(family) for family in families_of(runs)]
    assert [said for said in missing_controls(study) if "longer baselines" in said] == [
        "s=4 r=0.25 lacks longer baselines of seed 1: a speed-up from finished runs is of 1 of 2 "
        "seeds.",
        "s=4 r=0.25 lacks longer baselines of seed 1: a gap at equal data from finished runs is of "
        "1 of 2 seeds.",
    ]


def test_bounds_are_those_that_hold_for_every_seed() -> None:
    runs = [*scaling([50, 100, 200], 0), *scaling([100, 150], 1)]
    for end, bounds in ((2.0, (2, 0)), (3.9, (0, 2))):
        tst = [synthetic_run(falling(100, end), bag_size=4, seed=seed) for seed in (0, 1)]
        found = matchup_of([*runs, *tst]).speed_up_off_ends()
        assert found is not None
        assert (found.beyond, found.below) == bounds
        # One seed was trained for 200 steps and the other for 150; from 50 and from 100.
        assert (found.longest, found.shortest) == ((1.5, 0.5) if end == 2.0 else (2.0, 1.0))


@pytest.mark.parametrize("other", [{"lr_wsd_decay_iters": 10}, {"lr_warmup_iters": 9}])
def test_a_baseline_of_one_length_and_another_schedule_is_no_second_length(
    other: dict[str, Any],
) -> None:
    settings: dict[str, Any] = {"lr_wsd_decay_iters": 50, "lr_warmup_iters": 5}
    runs = [
        synthetic_run(falling(100, 3.0), name="own", **settings),
        synthetic_run(falling(100, 2.9), name="tst", bag_size=4, **settings),
        synthetic_run(falling(100, 2.5), name="other", **{**settings, **other}),
    ]
    found = matchup_of(runs)
    assert [group.runs[0].name for group in found.baselines] == ["own"]
    assert found.speed_up_off_ends() is None


def test_of_two_baselines_of_a_length_the_one_with_the_nearer_warm_up_counts() -> None:
    runs = [
        synthetic_run(falling(100, 3.0), lr_wsd_decay_iters=10),
        synthetic_run(falling(100, 2.9), bag_size=4, lr_wsd_decay_iters=10),
        *(
            synthetic_run(
                falling(205, 2.5),
                total_steps=205,
                # A tenth of 205 is no whole number.
                lr_wsd_decay_iters=20,
                lr_warmup_iters=warmup,
                name=f"warm-up {warmup}",
            )
            for warmup in (30, 10, 50)
        ),
    ]
    names = [group.runs[0].name for group in matchup_of(runs).baselines]
    assert names == ["baseline-100-lr_wsd_decay_iters10-seed0", "warm-up 10"]


def test_a_run_that_was_stopped_is_read_at_a_step_that_both_have() -> None:
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed))
        whole = synthetic_run(falling(100, 2.9), bag_size=4, seed=seed)
        runs.append(stopped(whole, 60))
    matchup = matchup_of(runs)
    # Its last loss is 4.1, that of the baseline at its end 3.
    assert matchup.gap is not None
    assert matchup.gap.mean == pytest.approx(0.1)
    (study,) = [study_of(family) for family in families_of(runs)]
    assert [one.gap.mean for one in study.ranked if one.gap] == [pytest.approx(0.1)]
    seldom = [synthetic_run(falling(100, 3.0), seed=seed, every=50) for seed in range(3)]
    assert matchup_of([*seldom, *runs[1::2]]).gap is None


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_was_stopped_between_validations_is_read_before(number: int) -> None:
    runs = []
    for seed in range(number):
        settings: dict[str, Any] = {"seed": seed, "every": 50, "total_steps": 300}
        runs.append(synthetic_run(falling(300, 3.0), name=f"base{seed}", **settings))
        whole = synthetic_run(falling(300, 2.9), bag_size=4, **{**settings, "every": 1})
        kept = np.isin(whole.steps, [50, 100, 124])
        names = ("steps", "validation_loss", "equivalent_tokens", "data_tokens", "seconds")
        rows = {name: getattr(whole, name)[kept] for name in names}
        runs.append(replace(whole, status="unfinished", **rows))
    study = study_of(families_of(runs)[0])
    assert study.ranked == []
    said = verdict(study)
    assert "the arms cannot be compared" in said[0]
    assert said[1].startswith("base0 was not evaluated near step 124")
    assert said[1].count("was not evaluated near") == number
    assert "At step 100, the last at which both arms were, " in said[1]
    assert "a gap of +0.100 nats" in said[1]
    assert captions([study])


def stopped(run: RunResult, step: int) -> RunResult:
    """A run as it is when it was stopped."""
    count = int(np.searchsorted(run.steps, step, side="right"))
    names = ("steps", "validation_loss", "equivalent_tokens", "data_tokens", "seconds")
    return replace(run, status="unfinished", **{name: getattr(run, name)[:count] for name in names})


def test_one_length_gives_no_speed_up_off_finished_runs() -> None:
    runs = [*scaling([100], 0), synthetic_run(falling(100, 2.9), bag_size=4)]
    assert matchup_of(runs).speed_up_off_ends() is None


@pytest.mark.parametrize("lengths", [[100, 175], [100, 150, 200]], ids=["trained", "between"])
def test_equal_data_is_read_off_a_baseline_that_read_as_much(lengths: list[int]) -> None:
    # s=4 and r=0.25 read 1.75 times the text.
    runs = [*scaling(lengths, 0), synthetic_run(falling(100, 2.9), bag_size=4)]
    found = matchup_of(runs).equal_data_off_ends()
    assert found is not None
    assert found.mean == pytest.approx(3.0 - 0.5 * log(1.75) - 2.9)


def test_equal_data_is_not_extrapolated() -> None:
    runs = [*scaling([100, 150], 0), synthetic_run(falling(100, 2.9), bag_size=4)]
    assert matchup_of(runs).equal_data_off_ends() is None


def test_the_switch_has_a_jump_and_a_crossing() -> None:
    baseline = synthetic_run(lambda step: 4.0)
    # 6 at the first validation after the switch at step 25, then down by 0.1 a step: 4 at step 50.
    tst = synthetic_run(lambda step: 9.0 - 0.1 * step, bag_size=4)
    found = Pair(baseline, tst).switch()
    assert found.crossing is not None
    assert found.crossing.at == pytest.approx(25.0)
    # Two nats lower by definition after the switch; means of steps 26 to 28 and 23 to 25.
    assert found.jump == pytest.approx(-2.0 - 0.3)


def test_no_crossing_is_no_number() -> None:
    pair = Pair(synthetic_run(lambda step: 1.0), synthetic_run(lambda step: 2.0, bag_size=4))
    assert pair.switch().crossing is None


def test_a_touch_that_is_lost_again_is_no_crossing() -> None:
    baseline = synthetic_run(lambda step: 4.0)
    # Under the baseline at 40, over it at 50 and 60, and under it from 80 on: level at 70.
    losses = {30: 5.0, 40: 3.9, 50: 4.1, 60: 4.1, 70: 4.0, 80: 3.9, 90: 3.9, 100: 3.9}
    tst = synthetic_run(lambda step: losses.get(int(step), 9.0), bag_size=4)
    crossing = Pair(baseline, tst).switch().crossing
    assert crossing is not None
    assert crossing.at == pytest.approx(70 - 25)
    behind = synthetic_run(
        lambda step: 4.1 if step == 100 else losses.get(int(step), 9.0), bag_size=4
    )
    assert Pair(baseline, behind).switch().crossing is None


def test_two_validations_do_not_say_what_happens_between_them() -> None:
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed, every=50))
        # Over the baseline at step 50 and under it at the end.
        tst = falling(100, 2.9, slope=0.04)
        runs.append(synthetic_run(tst, bag_size=4, seed=seed, every=50))
    matchup = matchup_of(runs)
    found = recovery_of(matchup)
    assert (found.recovered, found.steps, found.text) == (3, None, "25 to 75")
    assert matchup.speed_up_off_curve("equivalent tokens") is None
    assert matchup.mean_of(lambda pair: pair.equal_budget("data tokens").gap) is None
    # At a validation of either nothing is read between two.
    assert matchup.gap is not None
    assert matchup.gap.mean == pytest.approx(0.1)
    (study,) = [study_of(family) for family in families_of(runs)]
    said = " ".join(verdict(study))
    assert "between 25 and 75 steps after the switch: it was evaluated too seldom" in said
    assert "Read from one curve" not in said
    reading = matchup.pairs[0].equal_loss("equivalent tokens", "baseline")
    assert cost(reading, "TST") == "800 equivalent tokens to 1.60 k equivalent tokens"


def crossing_at(step_of_crossing: int, every: int, baseline_every: int) -> tuple[Pair, Pair]:
    """A pair of 3000 steps, TST evaluated so seldom, and the same with dense validations."""

    def baseline(step: float) -> float:
        return 3.0 - step / 3000

    def tst(step: float) -> float:
        return baseline(step) + (0.2 if step < step_of_crossing else -0.02)

    run = synthetic_run(baseline, total_steps=3000, every=baseline_every)
    seldom, often = (
        synthetic_run(tst, bag_size=2, step_ratio=0.3, total_steps=3000, every=steps)
        for steps in (every, 25)
    )
    return Pair(run, seldom), Pair(run, often)


@pytest.mark.parametrize("baseline_every", [25, 50, 500, 1000])
@pytest.mark.parametrize("step_of_crossing", [930, 1025, 1300, 1990, 2010, 2700])
def test_the_range_of_a_crossing_holds_it_where_one_arm_was_evaluated_seldom(
    step_of_crossing: int, baseline_every: int
) -> None:
    seldom, often = crossing_at(step_of_crossing, 1000, baseline_every)
    found = seldom.switch().crossing
    assert found is not None
    assert (found.at is None) == (step_of_crossing > 1000)
    assert found.low <= step_of_crossing - 900 <= found.high
    assert found.low + 900 in (900, 1000, 2000)
    assert found.high + 900 in (1000, 2000, 3000)
    if baseline_every <= 50:
        told = often.switch().crossing
        assert told is not None
        assert told.at == pytest.approx(step_of_crossing - 900, abs=50)


def test_arms_that_were_evaluated_at_no_common_step_say_nothing_of_a_crossing() -> None:
    runs = [
        synthetic_run(falling(100, 3.0), every=30, seed=0),
        synthetic_run(falling(100, 2.9), every=50, seed=0, bag_size=4),
    ]
    assert not Pair(*runs).switch().is_read
    matchup = matchup_of(runs)
    assert (recovery_of(matchup).seeds, recovery_of(matchup).text) == (0, "\N{EN DASH}")
    assert "cannot be said: no step after the switch" in switch_sentence(matchup)


@pytest.mark.parametrize(("decay", "is_read"), [(10, False), (17, False), (20, True), (None, True)])
def test_a_decay_is_not_read_off_one_straight_line(decay: int | None, is_read: bool) -> None:
    settings: dict[str, Any] = {} if decay is None else {"lr_wsd_decay_iters": decay}
    runs = [
        synthetic_run(falling(100, end), bag_size=size, **settings)
        for size, end in ((1, 3.0), (4, 2.9))
    ]
    # TST is at 3.0 between its validations at 90 and 100.
    assert (matchup_of(runs).speed_up_off_curve("equivalent tokens") is not None) == is_read


@pytest.mark.parametrize(("times", "is_read"), [(9, False), (10, True), (20, True)])
@pytest.mark.parametrize("total_steps", [3000, 3004, 3019])
def test_a_study_of_ten_validations_is_read_between_them(
    tmp_path: Path, times: int, is_read: bool, total_steps: int
) -> None:
    run = synthetic_run(falling(total_steps, 3.0), total_steps=total_steps)
    every = evaluated_every(tmp_path, times, total_steps)
    assert is_dense(run, every, 2 * every) == is_read


@pytest.mark.parametrize(("times", "is_read"), [(10, False), (19, False), (20, True)])
@pytest.mark.parametrize("total_steps", [3000, 3004, 3019])
def test_a_study_of_twenty_validations_is_read_in_a_decay_of_a_tenth(
    tmp_path: Path, times: int, is_read: bool, total_steps: int
) -> None:
    decay = round(0.1 * total_steps)
    run = synthetic_run(
        falling(total_steps, 3.0), total_steps=total_steps, lr_wsd_decay_iters=decay
    )
    every = evaluated_every(tmp_path, times, total_steps)
    assert is_dense(run, total_steps - every, total_steps) == is_read


def evaluated_every(folder: Path, times: int, total_steps: int) -> int:
    """Steps between two validations of a study."""
    content = study_content(folder / "corpus")
    content["validation"]["times"] = times
    content["defaults"]["total_steps"] = total_steps
    arguments = read_study(write_study(folder / "study.yaml", content)).runs()[0].arguments
    return int(arguments[arguments.index("--eval-interval") + 1])


def test_a_baseline_of_another_learning_rate_is_no_baseline() -> None:
    runs = [
        synthetic_run(falling(100, 3.0), learning_rate=2e-3),
        synthetic_run(falling(100, 2.9), bag_size=4),
    ]
    (family,) = families_of(runs)
    matchups, alone = matchups_of(family)
    assert not matchups
    assert [group.settings["learning_rate"] for group in alone] == [1e-3]


def test_a_learning_rate_tried_out_with_one_seed_is_no_verdict() -> None:
    runs = [
        synthetic_run(falling(100, end - 0.1 * (size > 1)), bag_size=size, seed=seed)
        for seed, end in enumerate((3.0, 3.01, 3.02))
        for size in (1, 4)
    ]
    runs += [
        synthetic_run(falling(100, end), bag_size=size, learning_rate=3e-3)
        for size, end in ((1, 2.95), (4, 2.9))
    ]
    (study,) = [study_of(family) for family in families_of(runs)]
    assert study.best is not None
    assert len(study.best.pairs) == 3
    (said,) = [caution for caution in cautions(study) if "ended lower" in caution]
    assert said.startswith(
        "baseline lr 0.003 (1 seed) ended lower than baseline (3 seeds), by fewer"
    )


def test_a_better_baseline_at_a_rate_without_tst_is_seen() -> None:
    def runs(bag_sizes: tuple[int, ...], rate: float = 2e-3) -> list[RunResult]:
        found = []
        for seed, noise in enumerate((0.0, 0.001, -0.001)):
            found.append(synthetic_run(falling(100, 3.0), seed=seed))
            other: dict[str, Any] = {"learning_rate": rate, "min_lr": rate / 10}
            found.append(synthetic_run(falling(100, 2.8), seed=seed, **other))
            for size in bag_sizes:
                end = falling(100, 2.9 + noise)
                found.append(synthetic_run(end, bag_size=size, seed=seed))
        return found

    (study,) = [study_of(family) for family in families_of(runs((4,)))]
    assert study.best is not None
    assert not study.has_best_baseline(study.best)
    assert (
        "s=4 r=0.25 against baseline lr 0.002 min_lr 0.0002, TST lost: a gap of "
        "\N{MINUS SIGN}0.100 nats" in verdict(study)[1]
    )
    (said,) = [caution for caution in cautions(study) if "ended lower" in caution]
    assert said == (
        "baseline lr 0.002 min_lr 0.0002 (3 seeds) ended lower than baseline (3 seeds): the gap is "
        "not one to the best baseline that was trained."
    )
    (study,) = [study_of(family) for family in families_of(runs((2, 4)))]
    assert "None is against the best baseline of its length." in verdict(study)[0]


def test_a_baseline_that_differs_in_more_than_its_tuning_is_no_better_one() -> None:
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed, device="CPU"))
        runs.append(synthetic_run(falling(100, 2.9), seed=seed, bag_size=4, device="CPU"))
        runs.append(synthetic_run(falling(100, 2.8), seed=seed, device="GPU"))
    (study,) = [study_of(family) for family in families_of(runs)]
    assert study.best is not None
    assert study.has_best_baseline(study.best)
    assert not any("ended lower" in caution for caution in cautions(study))


def test_each_arm_is_read_at_its_own_best_rate() -> None:
    ends = {1e-3: (3.0, 2.9), 2e-3: (3.1, 2.85)}
    runs = [
        synthetic_run(falling(100, end), bag_size=size, learning_rate=rate, seed=seed)
        for rate, both in ends.items()
        for size, end in zip((1, 4), both, strict=True)
        for seed in range(3)
    ]
    (study,) = [study_of(family) for family in families_of(runs)]
    assert study.best is not None
    tuned = tuned_arms(study, study.best)
    assert tuned is not None
    assert tuned.gap.mean == pytest.approx(3.0 - 2.85)
    assert [group.settings["learning_rate"] for group in (tuned.baseline, tuned.tst)] == [
        1e-3,
        2e-3,
    ]


def test_ends_of_runs_that_were_stopped_are_not_set_against_each_other() -> None:
    """Of two rates in progress, one at step 40 and one whose baseline is at 80."""
    runs = []
    for seed in range(3):
        for rate, steps in ((1e-3, (40, 40)), (2e-3, (80, 40))):
            for size, end, step in zip((1, 4), (3.0, 2.9), steps, strict=True):
                settings: dict[str, Any] = {"bag_size": size, "learning_rate": rate, "seed": seed}
                runs.append(stopped(synthetic_run(falling(100, end), **settings), step))
    (study,) = [study_of(family) for family in families_of(runs)]
    assert [matchup.gap.mean for matchup in study.ranked if matchup.gap] == [
        pytest.approx(0.1),
        pytest.approx(0.1),
    ]
    for matchup in study.matchups:
        assert study.lower_baselines(matchup) == []
        assert tuned_arms(study, matchup) is None
    assert not any("Each arm at the best" in sentence for sentence in verdict(study))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "There is no baseline among these runs: what s=4 r=0.25 gain cannot be said."),
        (
            [synthetic_run(falling(100, 3.0), seed=1)],
            "s=4 r=0.25 has no finished baseline of seed 0: that run is in no gap.",
        ),
        (
            [synthetic_run(falling(200, 3.0), total_steps=200)],
            "the nearest differs in total_steps (200 instead of 100). "
            "What it gains cannot be said.",
        ),
        (
            [synthetic_run(falling(100, 3.0)), synthetic_run(falling(100, 2.5), seed=1)],
            "All baselines have one length: how long one must train to end as low as TST cannot be "
            "said, nor which part of a gain on a longer one is its decay.",
        ),
    ],
)
def test_a_control_that_is_missing_is_named_with_what_cannot_be_said(
    others: list[RunResult], said: str
) -> None:
    runs = [synthetic_run(falling(100, 2.9), bag_size=4), *others]
    (study,) = [study_of(family) for family in families_of(runs)]
    found = cautions(study)
    assert any(caution.endswith(said) for caution in found), found


def test_what_a_baseline_did_not_record_is_said_where_it_keeps_a_run_from_it() -> None:
    runs = [
        synthetic_run(falling(100, 3.0)),
        replace(synthetic_run(falling(100, 2.9), bag_size=4), arguments={"a": 1}),
        replace(synthetic_run(falling(100, 3.0), seed=1), arguments={"a": 2}),
    ]
    (study,) = [study_of(family) for family in families_of(runs)]
    said = " ".join(cautions(study))
    assert "the nearest differs in a (not recorded instead of 1)" in said
    assert "(baseline-100-seed0) did not record: arguments beyond the settings" in said


def test_another_loss_is_another_setting_by_name() -> None:
    objectives = ("mce", "bce")
    runs = [synthetic_run(falling(100, 3.0))]
    runs += [synthetic_run(falling(100, 2.9), bag_size=4, objective=name) for name in objectives]
    (family,) = families_of(runs)
    assert [group.label for group in family.groups[1:]] == ["s=4 r=0.25", "s=4 r=0.25 bce"]
    assert [len(matchup.pairs) for matchup in study_of(family).matchups] == [1, 1]


def test_a_gap_to_an_untuned_baseline_comes_last() -> None:
    losses = {1e-3: (3.0, 2.9), 4e-3: (3.5, 2.95), 5e-4: (3.2, 3.1)}
    runs = []
    for rate, (baseline, tst) in losses.items():
        runs.append(synthetic_run(falling(100, baseline), learning_rate=rate))
        runs.append(synthetic_run(falling(100, tst), bag_size=4, learning_rate=rate))
    runs.append(synthetic_run(falling(100, 2.95), bag_size=8))
    (family,) = families_of(runs)
    ranked = [matchup.tst.label for matchup in study_of(family).ranked]
    # By gap alone it would be the second.
    assert ranked[:2] == ["s=4 r=0.25", "s=8 r=0.25"]
    assert ranked[2] == "s=4 r=0.25 lr 0.004"


def test_the_verdict_is_about_a_setting_with_the_most_seeds() -> None:
    runs = [synthetic_run(falling(100, 3.0), seed=seed) for seed in range(3)]
    runs += [synthetic_run(falling(100, 2.9), bag_size=4, seed=seed) for seed in range(3)]
    runs += [synthetic_run(falling(100, 2.95), bag_size=2, seed=seed) for seed in range(3)]
    # One seed with the largest gap of all, and as many seeds against an untuned baseline.
    runs[0] = synthetic_run(falling(100, 3.01))
    runs.append(synthetic_run(falling(100, 2.7), bag_size=8))
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.5), learning_rate=4e-3, seed=seed))
        runs.append(synthetic_run(falling(100, 3.1), bag_size=4, learning_rate=4e-3, seed=seed))
    study = study_of(families_of(runs)[0])
    assert study.ranked[0].tst.label == "s=8 r=0.25"
    assert study.best is not None
    assert study.best.tst.label == "s=4 r=0.25"
    assert "of those with the most seeds, is that of s=4 r=0.25" in verdict(study)[0]


def test_what_has_done_its_last_step_of_bags_is_no_ordinary_model() -> None:
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed))
        # At equal data the baseline ends where TST switches: s times r is 1.
        runs.append(synthetic_run(falling(100, 2.9), bag_size=4, step_ratio=0.25, seed=seed))
    study = study_of(families_of(runs)[0])
    (equal_data,) = [text for text in verdict(study) if text.startswith("At equal data")]
    assert "TST lost, while still in phase 1" in equal_data
    halfway = [runs[0], stopped(runs[1], 25)]
    study = study_of(families_of(halfway)[0])
    assert any("stopped in phase 1" in caution for caution in cautions(study))
    assert "while still in phase 1" in verdict(study)[0]
    halfway = [runs[0], stopped(runs[1], 30)]
    study = study_of(families_of(halfway)[0])
    assert not any("stopped in phase 1" in caution for caution in cautions(study))
    assert "while still" not in verdict(study)[0]


def test_before_the_end_of_its_runs_an_arm_has_won_nothing() -> None:
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed))
        run = synthetic_run(falling(100, 2.9 - 0.001 * seed), bag_size=4, seed=seed)
        runs.append(stopped(run, 70))
    study = study_of(families_of(runs)[0])
    said = verdict(study)[0]
    assert "TST is ahead where runs were stopped: validation loss" in said
    assert not re.search(r"\b(won|lost)\b", said)


def test_a_run_in_progress_is_ranked_behind_finished_ones() -> None:
    finished, halfway = [], []
    for seed in range(3):
        finished.append(synthetic_run(falling(100, 3.0), seed=seed))
        for size, end in ((2, 2.95), (8, 3.02)):
            run = synthetic_run(falling(100, end - 0.001 * seed), bag_size=size, seed=seed)
            finished.append(run)
        run = synthetic_run(falling(100, 2.9 - 0.001 * seed), bag_size=4, seed=seed)
        halfway.append(stopped(run, 50))
    study = study_of(families_of([*finished, *halfway])[0])
    assert [matchup.tst.settings["bag_size"] for matchup in study.ranked] == [2, 8, 4]
    assert verdict(study)[0] == (
        "3 TST settings at equal FLOPs: 1 won, 1 lost, 1 unfinished. The largest gap to the best "
        "baseline of its length, of those that are finished, is that of s=2 r=0.25; the sentences "
        "below are about it."
    )
    assert any("The best of 2 settings" in caution for caution in cautions(study))
    rows = matchups_table(study.matchups).rows
    assert [row[3] for row in rows] == ["won", "unfinished", "lost"]
    # Where none is finished the verdict is about the largest gap.
    study = study_of(families_of([*finished[::3], *halfway])[0])
    assert study.best is not None
    assert study.best.tst.settings["bag_size"] == 4


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ([0.2], "too few seeds"),
        ([0.2, 0.2001], "too few seeds"),
        ([0.2, 0.2001, 0.2002], "won"),
        ([-0.2, -0.2001, -0.2002], "lost"),
        ([0.2, -0.1, 0.0], "undecided"),
    ],
)
def test_fewer_than_three_seeds_win_nothing(gaps: list[float], word: str) -> None:
    assert outcome(estimate(gaps)) == word
    runs = []
    for seed, gap in enumerate(gaps):
        runs.append(synthetic_run(falling(100, 3.0), seed=seed))
        for size in (2, 4):
            runs.append(synthetic_run(falling(100, 3.0 - gap), bag_size=size, seed=seed))
    study = study_of(families_of(runs)[0])
    counted = f"with {word}" if len(gaps) < 3 else word
    assert verdict(study)[0].startswith(f"2 TST settings at equal FLOPs: 2 {counted}.")
    said = " ".join([*verdict(study), *cautions(study)])
    if len(gaps) < 3:
        assert not re.search(r"\bTST (won|lost)\b|ndecided", said)
    assert ("Too few seeds to decide anything" in said) == (len(gaps) == 2)


def test_labels_say_what_differs() -> None:
    runs = [
        *[synthetic_run(falling(100, 3.0), seed=seed) for seed in range(3)],
        synthetic_run(falling(150, 3.0), total_steps=150),
        synthetic_run(falling(100, 3.0), learning_rate=5e-4),
        synthetic_run(falling(100, 3.0), bag_size=4, target_weighting="uniform"),
        synthetic_run(
            falling(100, 3.0), bag_size=4, target_weighting="power-law", power_law_exponent=1.0
        ),
        synthetic_run(falling(100, 3.0), bag_size=4, step_ratio=0.5, variant="input-only"),
        synthetic_run(falling(100, 3.0), bag_size=2, weight_decay=0.2),
        synthetic_run(falling(100, 3.0), bag_size=2, weight_decay=0.3),
    ]
    (family,) = families_of(runs)
    assert [group.label for group in family.groups] == [
        "baseline",
        "baseline lr 0.0005",
        "baseline 1.5\N{MULTIPLICATION SIGN} steps",
        "s=2 r=0.25 weight_decay 0.2",
        "s=2 r=0.25 weight_decay 0.3",
        "s=4 r=0.25",
        "s=4 r=0.25 power-law",
        "s=4 r=0.5 input-only",
    ]


def test_other_data_is_another_family_by_name() -> None:
    other = {"data_path": "corpus", "split": "95,5,0"}
    runs = [
        synthetic_run(falling(100, 3.0)),
        synthetic_run(falling(100, 2.9), bag_size=4),
        synthetic_run(falling(100, 3.1), data=other, name="elsewhere"),
    ]
    names = [family.name for family in families_of(runs)]
    assert names == [
        "1.00 k parameters on corpus, split 98,2,0",
        "1.00 k parameters on corpus, split 95,5,0",
    ]


def test_the_same_seed_twice_is_refused() -> None:
    runs = [synthetic_run(falling(100, 3.0), name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="runs a and b have the same settings and seed 0"):
        families_of(runs)


def test_one_comparison_of_other_data_is_refused_by_name() -> None:
    baseline = synthetic_run(falling(100, 3.0), data={"split": "98,2,0"})
    tst = synthetic_run(falling(100, 2.9), bag_size=4, data={"split": "95,5,0"})
    with pytest.raises(ValueError, match=r"cannot be compared: they differ in split"):
        match_two(baseline, tst)


def test_two_runs_that_the_user_named_may_differ_in_their_seed() -> None:
    baseline = synthetic_run(falling(100, 3.0), seed=1)
    matchup = match_two(baseline, synthetic_run(falling(100, 2.9), bag_size=4, seed=2))
    assert matchup.differences == ("seed",)
    assert matchup.gap is not None
    assert matchup.gap.mean == pytest.approx(0.1)


def test_a_sweep_is_a_grid_with_holes() -> None:
    runs = [synthetic_run(falling(100, 3.0))]
    for size, ratio in ((2, 0.25), (4, 0.25), (4, 0.5), (8, 0.5)):
        law = "power-law" if size == 8 else "uniform"
        runs.append(
            synthetic_run(
                falling(100, 3.0 - size / 10), bag_size=size, step_ratio=ratio, target_weighting=law
            )
        )
    runs.append(synthetic_run(falling(100, 1.0), bag_size=6, variant="input-only"))
    (family,) = families_of(runs)
    sweep = largest_sweep(matchups_of(family)[0])
    assert sweep is not None
    assert (sweep.bag_sizes, sweep.step_ratios) == ([2, 4, 8], [0.25, 0.5])
    assert (2, 0.5) not in sweep.cells
    assert {r: len(line) for r, line in sweep.over_bag_sizes().items()} == {0.25: 2, 0.5: 2}
    assert {s: len(line) for s, line in sweep.over_step_ratios().items()} == {4: 2}
    gap = sweep.cells[4, 0.5].gap
    assert gap is not None
    assert gap.mean == pytest.approx(0.4)
