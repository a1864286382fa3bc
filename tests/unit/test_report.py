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

from megatron_tst.common.units import duration, quantity
from megatron_tst.report.cautions import cautions
from megatron_tst.report.comparison import Study, study_of_two
from megatron_tst.report.curves import first_reached, value_at
from megatron_tst.report.html import write_report
from megatron_tst.report.results import read_result
from megatron_tst.report.runs import read_run
from megatron_tst.report.wording import NOT_REACHED, verdict
from tests.unit.run_folders import (
    BASELINE,
    BATCH,
    RTOL,
    SETTINGS,
    TOTAL_STEPS,
    TST,
    baseline_loss,
    make_run,
    tst_loss,
    write_events,
    write_info,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """TST wins; its steps take twice as long."""
    root = tmp_path_factory.mktemp("runs")
    baseline = make_run(root / "baseline", BASELINE, baseline_loss)
    return baseline, make_run(root / "tst", TST, tst_loss, seconds_per_step=1.0)


@pytest.fixture(scope="module")
def study(runs: tuple[Path, Path]) -> Study:
    return study_of_two(*map(read_result, runs))


@pytest.fixture(scope="module")
def page(study: Study, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report") / "report.html"
    write_report([study], output, sample_text="Once <upon> a time")
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


@pytest.mark.parametrize(
    ("final", "words"),
    [(2.5, "TST is ahead"), (3.5, "TST is behind"), (3.0, "the arms drew")],
)
def test_verdict_follows_the_numbers(tmp_path: Path, final: float, words: str) -> None:
    baseline = make_run(tmp_path / "baseline", BASELINE, baseline_loss)
    shift = final - tst_loss(TOTAL_STEPS)
    tst = make_run(tmp_path / "tst", TST, lambda step: tst_loss(step) + shift)
    headline = verdict(study_of_two(read_result(baseline), read_result(tst)))[0]
    assert headline.startswith("At equal FLOPs")
    assert f"{words} in this one run" in headline


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


def test_the_only_validation_set_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", BASELINE, baseline_loss, leave_out="lm loss validation")
    for number, (tag, value) in enumerate(
        [("0", 3.0), ("0 vs samples", 4.0), ("0 ppl", 5.0), ("1", 6.0)]
    ):
        writer = SummaryWriter(str(run / "tensorboard"), filename_suffix=f".{number}")
        writer.add_scalar(f"lm loss validation-{tag}", value, TOTAL_STEPS)
        writer.close()
        if tag != "1":
            assert read_run(run).validation.values.tolist() == [3.0]
    with pytest.raises(ValueError, match=r"has no values of 'lm loss validation': .* on one valid"):
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


def test_swapped_arms_are_refused(runs: tuple[Path, Path]) -> None:
    baseline, tst = map(read_result, runs)
    with pytest.raises(ValueError, match=r"--baseline .* is a TST run"):
        study_of_two(tst, tst)
    with pytest.raises(ValueError, match=r"--tst .* without superposition"):
        study_of_two(baseline, baseline)


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({}, "One seed; no interval"),
        ({"seed": 8}, "more than superposition: seed"),
        (
            {"settings": {**SETTINGS, "lr": 0.002}},
            "more than superposition: learning_rate",
        ),
        ({"commit": "def5678"}, "different commits"),
        ({"machine": {"cpu": "another"}}, "different machines"),
        ({"losses": {"bags": "triton", "plain": "host"}}, "different kernels (host, triton, un"),
    ],
)
def test_cautions_name_what_makes_the_comparison_unfair(
    runs: tuple[Path, Path], tmp_path: Path, changes: Mapping[str, Any], caution: str
) -> None:
    tst = make_run(tmp_path / "tst", TST, tst_loss)
    write_info(tst, TST, **changes)
    found = cautions(study_of_two(read_result(runs[0]), read_result(tst)))
    assert any(caution in sentence for sentence in found)
    # One seed, baselines of one length, and arguments that these folders do not have.
    assert len(found) == (4 if changes else 3)


def test_other_data_is_refused_by_name(runs: tuple[Path, Path], tmp_path: Path) -> None:
    tst = make_run(tmp_path / "tst", TST, tst_loss)
    write_info(tst, TST, settings={**SETTINGS, "split": "90,10,0"})
    with pytest.raises(ValueError, match="cannot be compared: they differ in split"):
        study_of_two(read_result(runs[0]), read_result(tst))


def test_a_run_stopped_in_phase_1_is_no_verdict(runs: tuple[Path, Path], tmp_path: Path) -> None:
    tst = make_run(tmp_path / "tst", TST, tst_loss, steps=range(10, 21, 10))
    unfinished = study_of_two(read_result(runs[0]), read_result(tst))
    assert any("stopped in phase 1" in sentence for sentence in cautions(unfinished))
    names = [path.name for path in write_report([unfinished], tmp_path / "report.html")]
    assert "report-end-of-run.png" not in names


def test_a_diverged_run_is_marked_and_decides_nothing(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    tst = make_run(tmp_path / "tst", TST, lambda step: float("nan") if step > 50 else 3.0)
    study = study_of_two(read_result(runs[0]), read_result(tst))
    output = tmp_path / "report.html"
    assert write_report([study], output, results_page=tmp_path / "docs/results.md") == [output]
    page = output.read_text()
    assert '<a href="docs/results.md">What several seeds say' in page
    assert "No TST run can be set against a baseline" in page
    assert "1 of 1 runs of TST (s=4 r=0.25) diverged and are in no mean: tst." in page


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
    assert parser.tags.count("script") == 1
    assert not {"link", "iframe", "img"} & set(parser.tags)
    assert "http" not in page
    assert parser.references
    for reference in parser.references:
        assert reference.removeprefix("#") in parser.ids
    assert "currentColor" in page


def test_the_page_shows_the_numbers(page: str) -> None:
    shown = [
        "TST is ahead in this one run: validation loss 2.500 against 3.000, a gap of +0.500 nats",
        f"{exp(3.0):.3f}",
        f"{exp(2.5):.3f}",
        f"{1 - exp(-0.5):.1%} lower",
        "<td>1.11\N{MULTIPLICATION SIGN}</td>",
        NOT_REACHED,
        '<tr class="differs"><td>bag_size</td><td>1</td><td>4</td></tr>',
        "<title>TST (s=4 r=0.25): 2.5000 at 1.60 k equivalent tokens</title>",
        "<tr><td>num_layers</td><td>2</td><td>2</td></tr>",
        "One seed; no interval",
        "Once &lt;upon&gt; a time",
        "Example &lt;CPU&gt;",
        "abc1234",
        "python -m megatron_tst.pretrain --num-layers 2",
        "jumps at step 25",
    ]
    assert [text for text in shown if text not in page] == []


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
