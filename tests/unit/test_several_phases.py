"""Runs with bags of several sizes: their schedule, their records, and their comparison."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.report.comparison import study_of_two
from megatron_tst.report.html import write_report
from megatron_tst.report.pairs import Pair
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.report.runs import read_run
from megatron_tst.report.wording import jump_explanation, verdict
from megatron_tst.settings.phases import Bags, bags_of, recorded_phases
from megatron_tst.settings.step_sizes import StepSizes
from megatron_tst.settings.variants import VARIANTS
from megatron_tst.training.resume_batches import refuse_other_switch
from tests.unit.run_folders import (
    BASELINE,
    RTOL,
    TOKENS_PER_STEP,
    baseline_loss,
    make_run,
    schedule_of,
    tst_loss,
    write_info,
)

BAGS = ((8, 15), (4, 30))
CONFIG = SuperpositionConfig(bag_size=8, steps=45)
DRAWN = [2, 4, 4, 2, 4, 4, 4, 2, 2, 2, 2, 4]
TEXT = TOKENS_PER_STEP * (8 * 15 + 4 * 30 + 55)


def test_phases_lie_behind_each_other() -> None:
    schedule = schedule_of(CONFIG, BAGS)
    assert [schedule.bag_size_at(step) for step in (0, 14, 15, 44, 45, 99)] == [8, 8, 4, 4, 1, 1]
    assert [step for step in range(100) if schedule.begins_phase(step)] == [15, 45]
    assert [phase.first_sample for phase in schedule.phases] == [0, 30, 90]
    assert (schedule.switch_step, schedule.data_tokens(100)) == (45, TEXT)
    assert bags_of(schedule.phases) == BAGS


@pytest.mark.parametrize(
    ("text", "total", "bags"),
    [
        ("8:15,4:30", 100, BAGS),
        ("8:0.15, 4:0.3", 100, BAGS),
        ("2:15,4:30", 100, ((2, 15), (4, 30))),
        ("4:10,8:15,4:20", 100, ((4, 10), (8, 15), (4, 20))),
        # The ends are rounded: 1.5, 3 and 4.5 of 15.
        ("8:0.1,4:0.1,2:0.1", 15, ((8, 2), (4, 1), (2, 1))),
        # Not 0.30000000000000004 of 10 ** 17.
        ("8:0.1,4:0.2", 10**17, ((8, 10**16), (4, 2 * 10**16))),
    ],
)
def test_a_schedule_is_the_bags_that_it_says(text: str, total: int, bags: Bags) -> None:
    config = SuperpositionConfig(schedule=text)
    schedule = SuperpositionSchedule(config, total, BatchSizes.constant(2), 8)
    assert schedule.bags == bags
    by_hand = SuperpositionConfig(bag_size=config.bag_size, steps=sum(steps for _, steps in bags))
    assert schedule.config == by_hand
    assert (
        schedule.phases
        == SuperpositionSchedule(by_hand, total, BatchSizes.constant(2), 8, bags=bags).phases
    )


def test_a_schedule_of_one_size_is_that_bag_size() -> None:
    one, plain = SuperpositionConfig(schedule="4:0.3"), SuperpositionConfig(bag_size=4, steps=30)
    assert schedule_of(one) == schedule_of(plain)


@pytest.mark.parametrize(
    ("shares", "at_15", "at_45"),
    [
        ({"text_share": 0.8, "text_shares": [[8, 0.75], [4, 0.875]]}, 90.0, 195.0),
        # As earlier versions wrote it, and counted.
        ({"text_share": 0.8}, 96.0, 192.0),
    ],
)
def test_padding_of_a_run_is_read_as_it_was_counted(
    tmp_path: Path, shares: dict[str, Any], at_15: float, at_45: float
) -> None:
    run = make_run(tmp_path / "run", CONFIG, tst_loss, bags=BAGS, leave_out="tst/data tokens")
    write_info(run, CONFIG, BAGS, **shares)
    schedule = read_run(run, may_lack_scalars=True).schedule
    found = [schedule.data_tokens(step) / TOKENS_PER_STEP for step in (15, 45)]
    assert found == [at_15, at_45]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8:0.001,4:0.3", "gives bags of 8 no step"),
        ("8:60,4:40", "leaves no step for the last phase"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule={text} of 100 steps {message}"):
        schedule_of(SuperpositionConfig(schedule=text))


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    even, uneven = StepSizes.parse("4, 2"), StepSizes.parse("8:1,2:2.5,4:0.5")
    # Runs that were started with them go on for years.
    assert list(even.draw(1234, 12)) == DRAWN
    assert list(even.draw(1234, 4000))[:12] == DRAWN
    assert list(even.draw(1235, 12)) != DRAWN
    counts = Counter(uneven.draw(7, 8000))
    for size, share in ((2, 0.625), (4, 0.125), (8, 0.25)):
        # Five standard deviations.
        assert counts[size] == pytest.approx(
            8000 * share, abs=5 * (8000 * share * (1 - share)) ** 0.5
        )
    assert (even.text, uneven.text) == ("2,4", "2:2.5,4:0.5,8:1")


@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=4, unique=True),
    ramp=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.integers(1, 39),
    variant=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_sizes_count_every_step(
    sizes: list[int], ramp: list[int], steps: int, variant: str, seed: int
) -> None:
    config = SuperpositionConfig(bag_sizes=",".join(map(str, sizes)), steps=steps, variant=variant)
    batches = BatchSizes(tuple((13 * i, size) for i, size in enumerate(ramp)))
    schedule = SuperpositionSchedule(config, 40, batches, 8, seed=seed)
    drawn = list(StepSizes(tuple(sorted(sizes))).draw(seed, steps)) + [1] * (40 - steps)
    assert [schedule.bag_size_at(step) for step in range(40)] == drawn
    read = 0
    for step, size in enumerate(drawn):
        assert schedule.data_tokens(step) == read
        first, end = (batches.samples_at(s) for s in (step, step + 1))
        sample_sizes = {schedule.phase_of_sample(sample).bag_size for sample in range(first, end)}
        assert sample_sizes == {size}
        read += 8 * (end - first) * (1 if variant == "output-only" else size)
    assert schedule.data_tokens(40) == read
    assert [phase.first_step for phase in schedule.phases] == [0, steps]
    assert [step for step in range(40) if schedule.begins_phase(step)] == [steps]


def test_the_report_of_drawn_sizes(tmp_path: Path) -> None:
    config = SuperpositionConfig(bag_sizes="2,4", steps=45)
    baseline = read_result(make_run(tmp_path / "baseline", BASELINE, baseline_loss))
    tst = read_result(make_run(tmp_path / "tst", config, tst_loss))
    assert (tst.bag_size, tst.settings["bag_sizes"], len(tst.phases)) == (4, "2,4", 2)
    write_results([tst], tmp_path / "results.csv")
    (again,) = read_results(tmp_path / "results.csv")
    assert (again.settings, again.phases) == (tst.settings, tst.phases)
    study = study_of_two(baseline, tst)
    assert study.best is not None
    assert study.best.tst.label == "TST (s=2|4 r=0.45)"
    assert "in phase 1 it scores 2 or 4 tokens at once" in jump_explanation(study.best.pairs[0])


@pytest.mark.parametrize(
    "bags", [((8, 15), (4, 29)), ((6, 15), (4, 30)), ((8, 45), (4, 0)), ((8, 15), (1, 30))]
)
def test_bags_that_the_settings_contradict_are_refused(bags: Bags) -> None:
    with pytest.raises(ValueError, match="the largest 8, and 45 steps in all"):
        schedule_of(CONFIG, bags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, RunResult]:
    root = tmp_path_factory.mktemp("runs")
    baseline = make_run(root / "baseline", BASELINE, baseline_loss)
    tst = make_run(root / "tst", CONFIG, tst_loss, bags=BAGS)
    return read_result(baseline), read_result(tst)


def test_a_run_is_read_with_its_phases(runs: tuple[RunResult, RunResult], tmp_path: Path) -> None:
    _, tst = runs
    assert tst.settings["bags"] == "8:15+4:30"
    assert (tst.bag_size, tst.switch_step, tst.data_tokens[-1]) == (8, 45, TEXT)
    # Of the bags of 4, which were logged last: the one at step 40.
    assert tst.offset_losses == pytest.approx([tst_loss(40) + i for i in range(1, 5)], rel=RTOL)
    write_results([tst], tmp_path / "results.csv")
    (again,) = read_results(tmp_path / "results.csv")
    assert again.phases == tst.phases


@pytest.mark.parametrize("what", ["phases", "switch_step"])
def test_records_that_contradict_themselves_are_refused(tmp_path: Path, what: str) -> None:
    run = make_run(tmp_path, CONFIG, tst_loss, bags=BAGS)
    path = run / "tensorboard" / "tst_run.json"
    info = json.loads(path.read_text())
    value: Any = schedule_of(CONFIG, ((8, 15), (2, 30))).phases if what == "phases" else 15
    info[what] = value if what == "switch_step" else [phase.record() for phase in value]
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"switch_step 15|mixes two runs"):
        read_result(run)


def test_a_record_without_a_list_of_phases_has_two(tmp_path: Path) -> None:
    config = SuperpositionConfig(bag_size=4, step_ratio=0.25)
    run = make_run(tmp_path, config, tst_loss)
    expected = read_result(run)
    path = run / "tensorboard" / "tst_run.json"
    info = json.loads(path.read_text())
    assert info.pop("phases")
    path.write_text(json.dumps(info))
    found = read_result(run)
    assert (found.settings, found.phases) == (expected.settings, expected.phases)
    schedule = schedule_of(config)
    old = {"bag_size": 4, "switch_step": 25, "switch_sample": 50}
    assert recorded_phases(old) == schedule.phases
    new = {"bag_size": 4, "phases": [phase.record() for phase in schedule.phases]}
    assert recorded_phases(new) == schedule.phases
    assert len(recorded_phases({"bag_size": 1, "switch_step": 0})) == 1
    assert len(recorded_phases(None)) == 1


def test_what_a_run_had_spent_at_each_switch(runs: tuple[RunResult, RunResult]) -> None:
    pair = Pair(*runs)
    # Read off validations at 10 and 40, between which the pace changes.
    assert pair.spent_at_switches("equivalent tokens") == [
        15 * TOKENS_PER_STEP,
        45 * TOKENS_PER_STEP,
    ]
    at_switches = [TOKENS_PER_STEP * 8 * 15, TOKENS_PER_STEP * (8 * 15 + 4 * 30)]
    assert pair.spent_at_switches("data tokens") == pytest.approx(at_switches)
    assert pair.equal_budget("equivalent tokens").tst_in_superposition is False
    # The jump is that to single tokens.
    assert pair.switch().jump == pytest.approx(_mean(50, 60, 70) - _mean(20, 30, 40), rel=1e-5)


def _mean(*steps: int) -> float:
    return float(np.mean([tst_loss(step) for step in steps]))


def test_the_report_of_a_comparison(runs: tuple[RunResult, RunResult], tmp_path: Path) -> None:
    study = study_of_two(*runs)
    assert study.best is not None
    assert study.best.tst.label == "TST (s=8,4 r=0.45)"
    assert verdict(study)
    said = jump_explanation(study.best.pairs[0])
    assert "at step 45" in said
    assert "in phases 1 to 2 it scores 8 and then 4 tokens at once" in said
    write_report([study], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Phase 2 of TST (s=8,4 r=0.45)" in page
    assert "over the second half of phase 3" in page


def test_a_run_that_was_stopped_with_bags(tmp_path: Path) -> None:
    baseline = read_result(make_run(tmp_path / "baseline", BASELINE, baseline_loss))
    steps = range(2, 13, 2)
    tst = read_result(make_run(tmp_path / "tst", CONFIG, tst_loss, bags=BAGS, steps=steps))
    assert tst.status == "unfinished"
    pair = Pair(baseline, tst)
    assert pair.spent_at_switches("equivalent tokens") == [
        15 * TOKENS_PER_STEP,
        45 * TOKENS_PER_STEP,
    ]
    assert pair.equal_budget("equivalent tokens").tst_in_superposition
    assert any(
        "while still in phases 1 to 2" in line for line in verdict(study_of_two(baseline, tst))
    )


def test_another_split_of_the_bags_is_not_resumed() -> None:
    args, schedule = Namespace(load="run"), schedule_of(CONFIG, BAGS)
    refuse_other_switch(args, schedule, schedule.phases)
    other = schedule_of(CONFIG, ((8, 20), (4, 25)))
    with pytest.raises(
        ValueError, match=r"bags of 4 from sample 40 \(step 20\) on.*keep its phases"
    ):
        refuse_other_switch(args, schedule, other.phases)
    ramp = BatchSizes(((0, 1), (15, 2)))
    slower = SuperpositionSchedule(CONFIG, 100, ramp, 8, bags=BAGS)
    with pytest.raises(
        ValueError, match=r"this command has bags of 8 .* from sample 15 \(step 15\)"
    ):
        refuse_other_switch(args, slower, schedule.phases)
