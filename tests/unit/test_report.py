"""The comparison report: reading runs, the arithmetic on curves with known answers, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_tst.report.comparison import Comparison, compare, first_reached, value_at
from megatron_tst.report.html import write_report
from megatron_tst.report.runs import read_run
from megatron_tst.report.wording import NOT_REACHED, cautions, duration, quantity, verdict
from tests.unit.run_folders import (
    BASELINE,
    BATCH,
    RTOL,
    TOKENS_PER_STEP,
    TOTAL_STEPS,
    TST,
    baseline_loss,
    make_run,
    tst_loss,
    write_events,
    write_info,
)
from tools.compare_runs import main


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """TST wins; its steps take twice as long."""
    root = tmp_path_factory.mktemp("runs")
    baseline = make_run(root / "baseline", BASELINE, baseline_loss)
    tst = make_run(root / "tst", TST, tst_loss, seconds_per_step=1.0)
    return compare(read_run(baseline), read_run(tst))


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report") / "report.html"
    write_report(comparison, output, sample_text="Once <upon> a time")
    return output.read_text()


@pytest.mark.parametrize(
    ("target", "expected"),
    [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 25.0), (0.5, None)],
)
def test_first_reached_interpolates_and_takes_the_first_crossing(
    target: float, expected: float | None
) -> None:
    x, y = np.array([0.0, 10.0, 20.0, 30.0]), np.array([4.0, 2.0, 2.0, 1.0])
    assert first_reached(x, y, target) == expected


def test_first_reached_ignores_a_later_rise() -> None:
    x, y = np.array([0.0, 10.0, 20.0, 30.0]), np.array([4.0, 2.0, 5.0, 1.0])
    assert first_reached(x, y, 3.0) == 5.0


@pytest.mark.parametrize(("at", "expected"), [(5.0, 3.0), (10.0, 2.0), (10.1, None), (-1, None)])
def test_value_at_never_extrapolates(at: float, expected: float | None) -> None:
    assert value_at(np.array([0.0, 10.0]), np.array([4.0, 2.0]), at) == expected


def test_equal_flops_compares_the_ends_of_equally_long_runs(comparison: Comparison) -> None:
    reading = comparison.equal_flops
    assert reading.amount == TOTAL_STEPS * TOKENS_PER_STEP
    assert (reading.baseline_loss, reading.tst_loss) == pytest.approx((3.0, 2.5), rel=RTOL)
    assert reading.gap == pytest.approx(0.5, rel=RTOL)
    assert not reading.tst_in_superposition


def test_equal_data_is_read_where_the_baseline_has_read_all_its_text(
    comparison: Comparison,
) -> None:
    # TST reads 4 * 25 * 16 tokens in phase 1, which is what the baseline reads in its 100 steps:
    # a point halfway, in data tokens, between the validations at steps 20 (1280) and 30 (1680)
    # would be 1480; 1600 lies at 0.8, between losses 9 and 6.
    reading = comparison.equal_data
    assert reading.amount == 1600
    assert reading.baseline_loss == pytest.approx(3.0, rel=RTOL)
    assert reading.tst_loss == pytest.approx(9.0 - 0.8 * 3.0, rel=RTOL)


def test_equal_time_is_read_at_the_end_of_the_faster_run(comparison: Comparison) -> None:
    # The baseline takes 50 s; TST is at step 50 then, at a loss of 5.
    reading = comparison.equal_time
    assert reading.amount == pytest.approx(50.0, rel=RTOL)
    assert (reading.baseline_loss, reading.tst_loss) == pytest.approx((3.0, 5.0), rel=RTOL)


def test_speed_up_is_read_off_the_interpolated_curves(comparison: Comparison) -> None:
    # TST passes the baseline's 3.0 at step 90 of 100; its steps take twice as long.
    flops = comparison.equal_loss_for("baseline", "equivalent tokens")
    assert flops.tst_cost == pytest.approx(90 * TOKENS_PER_STEP, rel=RTOL)
    assert flops.speed_up == pytest.approx(100 / 90, rel=RTOL)
    time = comparison.equal_loss_for("baseline", "seconds")
    assert time.speed_up == pytest.approx(50 / 90, rel=RTOL)


def test_a_loss_that_an_arm_never_reaches_has_no_speed_up(comparison: Comparison) -> None:
    reading = comparison.equal_loss_for("TST", "equivalent tokens")
    assert reading.baseline_cost is None
    assert reading.speed_up is None


def test_equal_data_before_the_first_evaluation_is_not_read(tmp_path: Path) -> None:
    baseline = make_run(tmp_path / "baseline", BASELINE, baseline_loss, steps=range(10, 21, 10))
    tst = make_run(tmp_path / "tst", TST, tst_loss, steps=range(20, 101, 20))
    reading = compare(read_run(baseline), read_run(tst)).equal_data
    assert reading.amount == 20 * TOKENS_PER_STEP
    assert reading.tst_loss is None
    assert reading.gap is None


@pytest.mark.parametrize(
    ("final", "words"), [(2.5, "TST won"), (3.5, "TST lost"), (3.0, "the arms drew")]
)
def test_verdict_follows_the_numbers(tmp_path: Path, final: float, words: str) -> None:
    baseline = make_run(tmp_path / "baseline", BASELINE, baseline_loss)
    shift = final - tst_loss(TOTAL_STEPS)
    tst = make_run(tmp_path / "tst", TST, lambda step: tst_loss(step) + shift)
    headline = verdict(compare(read_run(baseline), read_run(tst)))[0]
    assert headline.startswith("At equal FLOPs")
    assert words in headline


def test_restarts_and_the_test_loss_do_not_change_the_curve(tmp_path: Path) -> None:
    """Steps done again after a restart count once; the test loss under the same tag not at all."""
    run = tmp_path / "run"
    # Crashed after step 60 and went on from a checkpoint at step 40.
    write_events(run, BASELINE, lambda step: 50.0 + step, steps=range(10, 61, 10), suffix=".1")
    write_events(
        run, BASELINE, baseline_loss, steps=range(50, 101, 10), suffix=".2", test_loss=99.0
    )
    write_info(run, BASELINE)
    series = read_run(run).validation
    assert series.steps.tolist() == list(range(10, 101, 10))
    expected = [60.0, 70.0, 80.0, 90.0] + [baseline_loss(step) for step in range(50, 101, 10)]
    assert series.values == pytest.approx(expected, rel=RTOL)


def test_seconds_go_on_past_the_last_logged_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", BASELINE, baseline_loss, steps=range(10, 91, 10))
    writer = SummaryWriter(str(run / "tensorboard"), filename_suffix=".2")
    writer.add_scalar("lm loss validation", 3.0, TOTAL_STEPS)
    writer.close()
    assert read_run(run).spent("seconds", TOTAL_STEPS) == pytest.approx(50.0, rel=RTOL)


@pytest.mark.parametrize("tag", ["lm loss validation", "tst/seconds", "tst/data tokens"])
def test_a_missing_scalar_is_named_with_its_folder(tmp_path: Path, tag: str) -> None:
    run = make_run(tmp_path / "run", BASELINE, baseline_loss, leave_out=tag)
    with pytest.raises(ValueError, match=re.escape(str(run)) + ".*" + re.escape(repr(tag))):
        read_run(run)


def break_nothing_but(run: Path, what: str) -> None:
    path = run / "tensorboard" / "tst_run.json"
    if what == "no json":
        path.unlink()
    elif what == "half a json":
        path.write_text(path.read_text()[:40])
    elif what == "no seed":
        info = json.loads(path.read_text())
        del info["seed"]
        path.write_text(json.dumps(info))
    elif what == "other run":
        write_info(run, BASELINE, batch_sizes=[[0, 2 * BATCH]])
    elif what == "other switch":
        write_info(run, BASELINE, switch_step=5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no json", "tst_run.json does not exist"),
        ("half a json", "is not JSON"),
        ("no seed", "has no seed"),
        ("other run", "mixes two runs"),
        ("other switch", "says switch_step 5"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, what: str, message: str) -> None:
    run = make_run(tmp_path / "run", BASELINE, baseline_loss)
    break_nothing_but(run, what)
    with pytest.raises(ValueError, match=message) as error:
        read_run(run)
    assert str(run) in str(error.value)


def test_swapped_arms_are_refused(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match=r"--baseline .* is a TST run"):
        compare(comparison.tst, comparison.tst)
    with pytest.raises(ValueError, match=r"--tst .* without superposition"):
        compare(comparison.baseline, comparison.baseline)


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({}, "One seed; no interval"),
        ({"seed": 8}, "more than superposition: seed"),
        ({"settings": {"lr": 0.002, "num_layers": 2}}, "more than superposition: lr"),
        ({"commit": "def5678"}, "different commits"),
        ({"machine": {"cpu": "another"}}, "different machines"),
    ],
)
def test_cautions_name_what_makes_the_comparison_unfair(
    comparison: Comparison, tmp_path: Path, changes: Mapping[str, Any], caution: str
) -> None:
    tst = make_run(tmp_path / "tst", TST, tst_loss)
    write_info(tst, TST, **changes)
    found = cautions(compare(comparison.baseline, read_run(tst)))
    assert any(caution in sentence for sentence in found)
    assert len(found) == (2 if changes else 1)


def test_a_run_stopped_in_phase_1_is_no_verdict(comparison: Comparison, tmp_path: Path) -> None:
    tst = make_run(tmp_path / "tst", TST, tst_loss, steps=range(10, 21, 10))
    unfinished = compare(comparison.baseline, read_run(tst))
    assert any("stopped in phase 1" in sentence for sentence in cautions(unfinished))
    names = [path.name for path in write_report(unfinished, tmp_path / "report.html")]
    assert "report-end-of-run.png" not in names


class References(HTMLParser):
    """Collects element ids and everything that an element refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("href", "src", "xlink:href"):
                self.references.append(str(value))
            self.references += re.findall(r"url\((.*?)\)", value or "")


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parser = References()
    parser.feed(page)
    assert parser.tags.count("svg") == 6
    assert not {"script", "link", "iframe", "img"} & set(parser.tags)
    assert "http" not in page
    assert parser.references
    for reference in parser.references:
        assert reference.removeprefix("#") in parser.ids
    assert "currentColor" in page


def test_the_page_shows_the_numbers(page: str) -> None:
    shown = [
        "TST won: validation loss 2.500 against 3.000, a gap of +0.500 nats",
        f"{exp(3.0):.3f}",
        f"{exp(2.5):.3f}",
        f"{1 - exp(-0.5):.1%} lower",
        "<td>1.11\N{MULTIPLICATION SIGN}</td>",
        NOT_REACHED,
        '<tr class="differs"><td>superposition.bag_size</td><td>1</td><td>4</td></tr>',
        "<tr><td>num_layers</td><td>2</td><td>2</td></tr>",
        "One seed; no interval",
        "Once &lt;upon&gt; a time",
        "Example &lt;CPU&gt;",
        "abc1234",
        "python -m megatron_tst.pretrain --num-layers 2",
        "jumps at step 25",
    ]
    assert [text for text in shown if text not in page] == []


def test_the_command_writes_page_and_plots(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report.html"
    arms = [comparison.baseline.folder, comparison.tst.folder]
    arguments = ["--baseline", str(arms[0]), "--tst", str(arms[1]), "--output", str(output)]
    assert main(arguments) == 0
    assert "TST won" in capsys.readouterr().out
    plots = sorted(path.name for path in output.parent.glob("*.png"))
    assert plots == [
        f"report-{name}.png"
        for name in (
            "end-of-run",
            "equal-data",
            "equal-flops",
            "offset-loss",
            "training-loss",
            "training-time",
        )
    ]
    # Nothing unfinished is left behind.
    assert len(list(output.parent.iterdir())) == 1 + len(plots)


def test_the_command_names_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--baseline", str(tmp_path / "none"), "--tst", "x", "--output", "y.html"]
    assert main(arguments) == 2
    assert "none has no folder tensorboard/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (950, "950"),
        (41_000_000, "41.0 M"),
        (1.05e12, "1.05 T"),
        (999_900, "1.00 M"),
        (123e9, "123 B"),
    ],
)
def test_quantity(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.25, "3.2 s"), (800, "13 min 20 s"), (7260, "2 h 1 min"), (200_000, "2 d 7 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
