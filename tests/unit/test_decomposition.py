"""The split of a gain into the decay and the bags, on curves whose parts are known."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.comparison import Study, study_of, study_of_two
from megatron_tst.report.decomposition import Gain, gains_of
from megatron_tst.report.describing import describe_settings
from megatron_tst.report.families import families_of, with_differing_arguments
from megatron_tst.report.html import report_html
from megatron_tst.report.markdown import write_tables
from megatron_tst.report.plots import render_plots
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.report.wording import parts_of_gain, verdict
from tests.unit.synthetic_runs import synthetic_run

DECAY, BAGS = 0.3, 0.05


def undecayed(step: float) -> float:
    """The loss of every baseline at a constant learning rate."""
    return 5.0 - 0.4 * log(step)


def decaying(total_steps: int, gain: float = 0.0, shift: float = 0.0):
    """A run that gains ``DECAY`` over its last tenth, and ``gain`` by its bags."""
    begin = 0.9 * total_steps

    def loss(step: float) -> float:
        share = max(step - begin, 0.0) / (total_steps - begin)
        return undecayed(step) + shift - DECAY * share - gain

    return loss


def seed_of(seed: int, *, control: bool = True, gain: float = BAGS, **settings: Any):
    """TST of 100 steps, its control, and a baseline of 300; a seed moves all three alike."""
    shift = 0.1 * seed
    runs = [
        synthetic_run(decaying(100, gain, shift), bag_size=4, seed=seed, every=5, **settings),
        synthetic_run(decaying(300, 0, shift), total_steps=300, seed=seed, every=5, **settings),
    ]
    if control:
        runs.append(synthetic_run(decaying(100, 0, shift), seed=seed, every=5, **settings))
    return runs


def study(runs: list[RunResult]) -> Study:
    (family,) = families_of(with_differing_arguments(runs))
    return study_of(family)


def gain_of(runs: list[RunResult]) -> Gain:
    (gain,) = gains_of(study(runs))
    return gain


def test_the_parts_are_those_that_the_curves_were_made_of() -> None:
    runs = [run for seed, bags in enumerate((0.04, 0.05, 0.06)) for run in seed_of(seed, gain=bags)]
    gain = gain_of(runs)
    assert gain.decay.mean == pytest.approx(DECAY)
    assert gain.decay.half_width == pytest.approx(0, abs=1e-9)
    assert gain.bags.mean == pytest.approx(BAGS)
    # Standard deviation 0.01 over three seeds.
    assert gain.bags.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert gain.total.mean == pytest.approx(DECAY + BAGS)
    assert gain.decay_share == pytest.approx(DECAY / (DECAY + BAGS))
    assert "+0.300 \N{PLUS-MINUS SIGN} 0.000 (86%) are the decay" in parts_of_gain(study(runs))


def test_speed_ups_off_the_longer_curve_credit_the_decay() -> None:
    gain = gain_of(seed_of(0))
    both, decay = gain.apparent_speed_up, gain.apparent_speed_up_of_control
    assert both is not None
    assert decay is not None
    # 0.4 log(x) nats are gained by training x times as long.
    assert both.mean == pytest.approx(exp((DECAY + BAGS) / 0.4), rel=0.01)
    assert decay.mean == pytest.approx(exp(DECAY / 0.4), rel=0.01)


def test_a_curve_that_is_evaluated_too_seldom_gives_no_speed_up() -> None:
    tst, longer, control = seed_of(0)
    longer = synthetic_run(decaying(300), total_steps=300, every=100)
    gain = gain_of([tst, longer, control])
    assert gain.total.mean == pytest.approx(DECAY + BAGS)
    assert gain.apparent_speed_up is None


def test_bags_that_cost_leave_no_share() -> None:
    gain = gain_of(seed_of(0, gain=-0.1))
    assert gain.bags.mean == pytest.approx(-0.1)
    assert gain.total.mean == pytest.approx(0.2)
    assert gain.decay_share is None


def test_without_a_control_the_gain_is_not_separable() -> None:
    gain = gain_of(seed_of(0, control=False))
    assert not gain.pairs
    assert gain.not_separable == "no finished baseline of 100 steps has the same settings"


def test_with_every_control_diverged_the_gain_is_not_separable() -> None:
    runs = [run for seed in range(3) for run in seed_of(seed)]
    lost = [replace(run, status="diverged") if is_control(run) else run for run in runs]
    (gain,) = gains_of(study_of(families_of(lost)[0]))
    assert not gain.pairs
    assert gain.not_separable == "no finished baseline of 100 steps has the same settings"


def is_control(run: RunResult) -> bool:
    return run.settings["bag_size"] == 1 and run.total_steps == 100


def test_a_longer_baseline_that_was_named_is_no_control_of_itself() -> None:
    tst, longer, _ = seed_of(0)
    (gain,) = gains_of(study_of_two(longer, tst))
    assert gain.not_separable == "no finished baseline of 100 steps has the same settings"


def test_a_control_of_other_settings_is_none() -> None:
    tst, longer, _ = seed_of(0)
    control = synthetic_run(decaying(100), every=5, learning_rate=2e-3)
    assert gain_of([tst, longer, control]).not_separable


def test_runs_cut_off_in_their_decay_are_not_separable() -> None:
    tst, longer, _ = seed_of(0)
    control = synthetic_run(decaying(100), every=5, status="unfinished")
    gain = gain_of([tst, longer, control])
    assert gain.not_separable == f"cut off before the end of a decay: {control.name}"
    assert "is not separable" in " ".join(verdict(study([tst, longer, control])))


def test_a_schedule_longer_than_the_run_is_a_cut() -> None:
    runs = seed_of(0, lr_decay_share=2.0)
    names = ", ".join(run.name for run in (runs[2], runs[0]))
    assert gain_of(runs).not_separable == f"cut off before the end of a decay: {names}"


def test_a_cut_that_all_runs_have_is_told_by_a_table_too(tmp_path: Path) -> None:
    arguments = {"lr": 1e-3, "train_iters": 100, "lr_decay_iters": 150}
    told = describe_settings(arguments)
    assert told["lr_decay_share"] == 1.5
    assert "lr_decay_share" not in describe_settings({**arguments, "lr_decay_iters": 100})
    assert "lr_decay_share" not in arguments_that_can_matter(arguments)
    table = tmp_path / "results.csv"
    write_results(seed_of(0, lr_decay_share=told["lr_decay_share"]), table)
    (found,) = study(read_results(table)).matchups
    assert gain_of(read_results(table)).not_separable
    # Nor do they say how long a finished baseline must train.
    assert found.speed_up_off_ends() is None
    assert found.equal_data_off_ends() is None
    whole = study([*seed_of(0)]).matchups[0]
    assert whole.speed_up_off_ends() is not None


@pytest.mark.parametrize(
    ("settings", "total_steps", "is_split"),
    [
        # The decay of the longer one begins at 60, at 180 and, cut off, at 240.
        ({"lr_wsd_decay_iters": 40}, 110, False),
        ({"lr_wsd_decay_iters": 40}, 300, True),
        ({"lr_wsd_decay_iters": 40, "lr_decay_style": "WSD"}, 300, True),
        ({"lr_decay_style": "cosine"}, 300, False),
    ],
)
def test_a_longer_baseline_is_read_before_its_own_decay(
    settings: dict[str, Any], total_steps: int, is_split: bool
) -> None:
    runs = [run for run in seed_of(0, **settings) if run.total_steps == 100]
    if decay := settings.get("lr_wsd_decay_iters"):
        settings = {**settings, "lr_wsd_decay_iters": round(decay * total_steps / 100)}
    runs.append(synthetic_run(decaying(total_steps), total_steps=total_steps, every=5, **settings))
    gain = gain_of(runs)
    assert bool(gain.pairs) == is_split
    assert is_split or gain.not_separable == f"read within its own decay: {runs[-1].name}"


def test_a_decay_of_another_share_is_another_schedule() -> None:
    runs = seed_of(0, lr_wsd_decay_iters=10)
    assert runs[1].total_steps == 300
    assert not gains_of(study(runs))


@pytest.mark.parametrize(("every", "is_read"), [(100, True), (99, True), (60, False)])
def test_a_longer_baseline_is_read_only_where_it_was_evaluated(every: int, is_read: bool) -> None:
    tst, _, control = seed_of(0)
    longer = synthetic_run(decaying(300), total_steps=300, every=every)
    assert len(gains_of(study([tst, longer, control]))) == is_read


def test_seeds_that_one_of_the_three_lacks_are_left_out() -> None:
    runs = [*seed_of(0), *seed_of(1)[:2], *seed_of(2)]
    assert gain_of(runs).total.n == 2


def test_the_report_shows_the_parts(tmp_path: Path) -> None:
    found = study([run for seed in range(3) for run in seed_of(seed)])
    plots = render_plots(found)
    assert "gain-parts" in [plot.name for plot in plots]
    page = report_html([found], [plots])
    assert "What is the decay, and what are the bags" in page
    assert "+0.350 \N{PLUS-MINUS SIGN} 0.000" in page
    write_tables([found], tmp_path / "tables.md")
    assert "of it the bags" in (tmp_path / "tables.md").read_text()
    alone = study([run for run in seed_of(0) if run.total_steps == 100])
    assert "What is the decay" not in report_html([alone], [render_plots(alone)])
