"""How many steps fit into a time, and what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_tst.study.execution import Execution
from megatron_tst.study.pace import Pace, Plan, choose_steps, measure_pace
from megatron_tst.study.quickstart import Settings
from megatron_tst.study.run_folder import RunFolder

PLANNED = Settings().steps


def plan_at(
    milliseconds: float, minutes: float = 12, rounds: int = 1, may_shorten: bool = True
) -> Plan:
    pace = Pace(milliseconds / 1e3, 15.0, rounds, Settings().batches)
    return choose_steps(PLANNED, pace, 20.0, 60.0, minutes, may_shorten)


def test_a_run_has_its_steps_and_its_evaluations() -> None:
    # 20 evaluations and the last one, of 100 batches.
    assert Settings().batches(12_000) == 12_000 + 21 * 100
    # Shorter runs are evaluated less often, on as much text.
    assert Settings().batches(6_000) == 6_000 + 11 * 100
    assert Settings().batches(4_000) == 4_000 + 6 * 100


@pytest.mark.parametrize(
    ("milliseconds", "steps"),
    [
        (25, 12_000),
        # 20 + 15 + 14,100 x 0.0455 + 20 + 200 x 0.0455 seconds are 706.
        (45.5, 12_000),
        # 12,000 steps would be 724 s; 11,000 from here on 60 + 15 + 12,100 x 0.0468 + 29.4.
        (46.8, 11_000),
        (50, 11_000),
        (100, 5_000),
        (400, 1_000),
    ],
)
def test_steps_follow_from_the_pace(milliseconds: float, steps: int) -> None:
    plan = plan_at(milliseconds)
    assert plan.steps == steps
    assert plan.is_shortened == (steps < PLANNED)
    if milliseconds < 400:
        assert plan.expected_minutes <= 12


def test_the_most_steps_that_fit_are_taken() -> None:
    for milliseconds in range(40, 200, 7):
        plan = plan_at(milliseconds)
        if plan.is_shortened:
            more = Pace(milliseconds / 1e3, 15.0, 1, Settings().batches)
            assert 60 + more.seconds_for(plan.steps + 1_000) > 12 * 60


def test_one_core_takes_twice_the_time() -> None:
    assert plan_at(25, rounds=2).steps < plan_at(25).steps
    assert plan_at(25, minutes=24, rounds=2).steps == PLANNED


def test_steps_that_were_asked_for_are_kept() -> None:
    plan = plan_at(1_000, may_shorten=False)
    assert plan.steps == PLANNED
    assert "expecting to finish 239 minutes after the start" in plan.sentences()


def test_a_short_run_is_not_shortened() -> None:
    pace = Pace(10.0, 15.0, 1, Settings().batches)
    assert choose_steps(600, pace, 0.0, 60.0, 1.0, may_shorten=True).steps == 600


def test_the_sentences_say_what_shortening_costs() -> None:
    words = plan_at(100).sentences()
    assert "100 ms a step: 12,000 steps would not fit into 12 minutes" in words
    assert "Both arms do 5,000, for equal FLOPs" in words
    assert "says little about a longer one" in words
    assert "fewer would show nothing" not in words
    assert "fewer would show nothing" in plan_at(400).sentences()
    assert "cost" not in plan_at(25).sentences()


def test_a_plan_is_plain_data() -> None:
    assert dataclasses.asdict(plan_at(100))["steps"] == 5_000


def test_the_pace_is_that_of_the_slower_run_after_its_first_interval(tmp_path: Path) -> None:
    runs = [Execution(name, RunFolder(tmp_path / name), [], 100) for name in ("a", "b")]

    def log(run: Execution, milliseconds: list[int]) -> None:
        run.folder.path.mkdir(exist_ok=True)
        lines = [
            f" [] iteration {i}/ 9 | elapsed time per iteration (ms): {time}.0 | lm loss: 3.0 |\n"
            for i, time in enumerate(milliseconds, start=1)
        ]
        run.folder.log.write_text("".join(lines))
        run.log.poll()

    assert measure_pace([], 1, Settings().batches) is None
    log(runs[0], [900, 10, 10, 10, 10, 10, 500])
    log(runs[1], [900, 20, 20, 30, 40])
    assert measure_pace(runs, 1, Settings().batches) is None
    log(runs[1], [900, 20, 20, 30, 40, 40])
    for run, first_logged in zip(runs, (107.0, 109.0), strict=True):
        run.started, run.first_logged = 100.0, first_logged
    pace = measure_pace(runs, 1, Settings().batches)
    assert pace is not None
    assert pace.seconds_a_step == pytest.approx(0.030)
    assert pace.seconds_to_start == pytest.approx(9.0)


def test_both_arms_get_the_steps(tmp_path: Path) -> None:
    shorter = dataclasses.replace(Settings(), steps=4_000, precision="fp32")
    arguments = shorter.megatron_arguments(tmp_path / "text")

    def value(name: str) -> int:
        return int(arguments[arguments.index(name) + 1])

    names = ("--train-iters", "--lr-warmup-iters", "--lr-wsd-decay-iters", "--eval-interval")
    assert [value(name) for name in names] == [4_000, 200, 400, 800]
    assert "--bf16" not in arguments
    assert "--bf16" in Settings().megatron_arguments(tmp_path / "text")
