"""What the planner and its page say beyond the published tables, against docs/results.md, and the
runs that a plan says to compare."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tst.commands.plan_run import main
from megatron_tst.common.units import TIMES
from megatron_tst.planning.advisor import make_plan
from megatron_tst.planning.arms import Arm
from megatron_tst.planning.evidence import (
    ABOUT_OUTPUT_ONLY,
    EQUAL_DATA,
    LARGEST_STUDIED_PARAMETERS,
    OUTPUT_ONLY_GAP,
    RATIOS,
    SHORT_GAPS,
    SHORT_RUNS,
    SOURCES,
)
from megatron_tst.planning.limits import warnings
from megatron_tst.planning.published import published_runs
from megatron_tst.planning.wording import controls, launch_flags, plan_as_json
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.study.pace import EVIDENCE
from tests.results_page import CHOOSING as CHOOSING_PAGE
from tests.results_page import PAGE, ROOT, SECTIONS, reading, refreshed, told
from tests.unit.test_planning import request

RESULTS = PAGE.read_text()
CHOOSING = CHOOSING_PAGE.read_text()
DATA_BOUND = ("--model", "3B", "--gpus", "64", "--gpu-hours", "247", "--tokens", "42B")
BAGS = "s=2 r=0.3"


def verdict_on(claim: str) -> str:
    """Of a row of "Claim by claim"; its start suffices."""
    (row,) = re.findall(rf"^\| {re.escape(claim)}.*$", RESULTS, re.M)
    return re.findall(r"\*\*([a-z ]+)<!--verdict", row)[0]


def test_gaps_that_a_plan_quotes_are_those_of_the_tables() -> None:
    assert told(f"gap 127k: {BAGS} output-only") == OUTPUT_ONLY_GAP
    for size, gap in SHORT_GAPS.items():
        assert told(f"gap 127k: s={size} r=0.3") == gap
    assert OUTPUT_ONLY_GAP in ABOUT_OUTPUT_ONLY
    assert told(f"is gap subwords: {BAGS} output-only") == "undecided"
    assert all(gap in SHORT_RUNS for gap in SHORT_GAPS.values())
    # The subword study decides nothing.
    studied = [parameters for table, parameters in SECTIONS.values() if table != "subwords"]
    assert max(studied) == LARGEST_STUDIED_PARAMETERS


@pytest.mark.parametrize(
    ("sentence", "words", "claim", "verdict"),
    [
        (ABOUT_OUTPUT_ONLY, "and worse", "output-only: better than the baseline", "contradicted"),
        (EQUAL_DATA, "either may", "equal data: the baseline wins", "mixed"),
        (SOURCES, "no larger bag was better", "a larger bag is better than s = 2", "contradicted"),
        (RATIOS, "undecided", "r below 0.2 gains less", "undecided"),
        (RATIOS, "undecided", "r above 0.5 does not recover", "undecided"),
        (CHOOSING, "both at 127k", "output-only: worse than full", "reproduced in part"),
        (CHOOSING, "baseline at 127k", "input-only: better than the", "reproduced in part"),
        (CHOOSING, "on `full` undecided", "input-only: worse than full", "undecided"),
    ],
)
def test_what_is_said_is_the_verdict_of_the_studies(
    sentence: str, words: str, claim: str, verdict: str
) -> None:
    assert words in sentence
    assert verdict_on(claim) == verdict


def test_gaps_and_states_on_the_page_are_those_of_the_tables() -> None:
    assert refreshed(CHOOSING) == CHOOSING
    assert CHOOSING.count("<!--") >= 8
    for gap in (f"gap 127k: {BAGS} output-only", f"is diff 127k: {BAGS} input-only vs {BAGS}"):
        assert f"<!--{gap}-->" in CHOOSING


def test_the_quickstart_does_not_say_that_the_gap_grows() -> None:
    ascending = (f"gap 127k: {BAGS}", f"gap 127k: {BAGS} 2{TIMES} steps", f"gap long: {BAGS}")
    short, longer, longest = (reading(gap) for gap in ascending)
    assert short is not None
    assert longer is not None
    assert longest is not None
    # It goes up, and down again.
    assert short.mean < longer.mean > longest.mean
    for text in (EVIDENCE, (ROOT / "docs/quickstart.md").read_text()):
        assert "grows with" not in text
        assert "in very short runs TST" in text


def test_the_range_of_published_runs_is_that_of_their_table() -> None:
    dense = [run for run in published_runs() if run.model != "10B-A1B" and run.tst_steps]
    ascending = sorted(dense, key=lambda run: run.tokens_a_parameter)
    fewest, most = ascending[0], ascending[-1]
    (experts,) = (run for run in published_runs() if run.model == "10B-A1B" and run.tst_steps)
    # By hand: 20,000 steps of 2^21 tokens, and all parameters.
    assert fewest.tokens_a_parameter == 20_000 * 2**21 / 3_337_766_912
    # Those that a token visits.
    assert experts.tokens_a_parameter == 49_983 * 2**23 / 1_196_074_496
    row = (
        f"| {fewest.tokens_a_parameter:.1f} ({fewest.model}) to {most.tokens_a_parameter:.0f} "
        f"({most.model}), and {experts.tokens_a_parameter:.0f} an active parameter "
        f"({experts.model}), larger bags |"
    )
    assert row in RESULTS
    assert f"20,000 steps and {fewest.tokens_a_parameter:.1f} tokens a parameter" in CHOOSING


def test_a_plan_with_fewer_tokens_a_parameter_than_any_is_warned_about() -> None:
    def warned(hours: float) -> bool:
        sentences = warnings(make_plan(request("3B", hours)))
        return any("the fewest of a published run are 12.6" in each for each in sentences)

    assert not warned(247)
    assert warned(246)


def test_output_only_is_on_either_side_of_the_baseline() -> None:
    plan = make_plan(request("3B", 247, tokens=42e9))
    ((name, arm),) = plan.alternatives
    loss, baseline = arm.loss, plan.recommended.loss
    assert "no gain shown" in name
    assert loss.value == baseline.value
    assert loss.low < baseline.low
    assert loss.high > baseline.high
    assert loss.outside


def test_a_plan_says_where_its_advice_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main([*DATA_BOUND, "--json", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    plan = json.loads(file.read_text())
    assert plan["evidence"] == [SOURCES, ABOUT_OUTPUT_ONLY]
    assert all(sentence in shown for sentence in plan["evidence"])
    assert EQUAL_DATA in shown
    assert "one run a setting" in SOURCES
    assert "three seeds" in ABOUT_OUTPUT_ONLY
    # Where it is not offered, nothing is said of it.
    assert plan_as_json(make_plan(request("3B", 247)))["evidence"] == [SOURCES]


def test_the_run_that_controls_are_of_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main([*DATA_BOUND, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    plan = json.loads(file.read_text())
    compared, controls_of = plan["compared"], plan["controls"]
    assert compared["steps"] == 8006
    bags = ["--tst-bag-size", "6", "--tst-steps", "2402"]
    assert compared["flags"][-6:-2] == bags
    assert "--train-iters 8006 \\" in shown
    assert shown.index(" ".join(bags)) < shown.index("equal FLOPs:\n")
    steps = {each["compared_at"]: each["steps"] for each in controls_of}
    assert steps["equal FLOPs"] == compared["steps"]


def test_the_recommended_run_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DATA_BOUND[:-1], "300B"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--tst-bag-size 6 --tst-steps 6000") == 1
    assert "To compare, train baselines of these lengths" in shown


@pytest.mark.parametrize("tokens", [30e9, 42e9, 60e9, 300e9])
def test_every_control_is_of_a_run_whose_flags_the_plan_holds(tokens: float) -> None:
    plan = make_plan(request("3B", 247, tokens))
    held = plan_as_json(plan)
    assert held["compared"]["flags"] == " ".join(launch_flags(plan, plan.tst)).split()
    found: dict[str, Arm] = dict(controls(plan))
    (at_equal_flops,) = (arm for name, arm in found.items() if "equal FLOPs" in name)
    assert at_equal_flops.steps == plan.tst.steps


def test_an_alternative_of_another_length_has_all_its_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    schedule = SuperpositionConfig(schedule="4:0.1,2:0.15")
    plan = make_plan(replace(request("3B", 247, tokens=30e9), several=schedule))
    assert plan.recommended.steps == 14_305
    flags = {each["name"]: each["flags"] for each in plan_as_json(plan)["alternatives"]}
    asked = flags["the sizes asked for"]
    assert asked[asked.index("--train-iters") + 1] == "20000"
    assert main([*DATA_BOUND[:-1], "30B", "--tst-schedule", "4:0.1,2:0.15"]) == 0
    shown = capsys.readouterr().out
    behind = shown[shown.index("Instead, the sizes asked for") :]
    assert behind.index("--train-iters 20000") < behind.index("--tst-schedule 4:2000,2:3000")
