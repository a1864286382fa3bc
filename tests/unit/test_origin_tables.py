"""Tables of where a gain comes from, on measurements whose gaps are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tst.common.errors import UsageError
from megatron_tst.report.describing import Setting
from megatron_tst.report.origin_seeds import paired
from megatron_tst.report.origin_settings import unrecorded
from megatron_tst.report.origin_switch import moment_ratio
from megatron_tst.report.origin_tables import sections
from megatron_tst.report.origins import (
    GRADIENT,
    MOMENT,
    POSITION,
    POSITION_TOKENS,
    STEPS_AFTER,
    TEXT,
    TRAINING,
    VALIDATION,
    Arm,
    Key,
    Trace,
    arms_of,
    read_traces,
    write_traces,
)

TOTAL, SWITCH, LENGTH = 1000, 300, 6
SEEDS = (1, 2, 3)
# What a seed adds to all losses, so that only pairs show the gaps.
SEED_LOSS = 0.5


def trace(arm: str, seed: int, bag_size: int, gain: float) -> Trace:
    """Bags lose 0.2 at every second position of the text, and gain at the others."""
    high = SEED_LOSS * seed + 2.0
    values: dict[Key, float] = {(VALIDATION, TOTAL, ""): high - gain}
    # Behind by 0.3 at 400, ahead by 0.1 at 500: level three quarters of the way.
    values |= {(VALIDATION, 400, ""): high + 3 * gain, (VALIDATION, 500, ""): high - gain}
    for place in range(1, LENGTH + 1):
        sign = 1 if place % 2 else -2
        values[POSITION, TOTAL, str(place)] = high - sign * gain
        values[POSITION_TOKENS, TOTAL, str(place)] = 10.0 * place
    for step in (SWITCH, SWITCH + 10, SWITCH + 200):
        values[TEXT, step, ""] = high + gain * (SWITCH + 100 - step) / 100
        values[MOMENT, step, "weight"] = (1 + gain) ** (SWITCH + 200 - step)
    for step in range(SWITCH - 49, SWITCH + STEPS_AFTER + 1):
        values[GRADIENT, step, ""] = 1.0 + gain * (step > SWITCH)
        values[TRAINING, step, ""] = high
    switch = SWITCH if bag_size > 1 else None
    return Trace(arm, seed, TOTAL, switch, bag_size, "text", "machine", "commit", values)


TRACES = [
    *(trace("baseline", seed, 1, 0.0) for seed in SEEDS),
    *(trace("bags", seed, 2, 0.1) for seed in SEEDS),
]


@pytest.fixture
def arms() -> list[Arm]:
    return arms_of(TRACES)


def rows(arms: list[Arm], title: str) -> list[list[str]]:
    [found] = [section for section in sections(arms) if section.title == title]
    return [list(row) for row in found.table.rows]


def test_gaps_are_paired_by_seed(arms: list[Arm]) -> None:
    found = paired(arms[1], arms[0], lambda run: run.final_loss)
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.n == 3
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    baseline, bags = rows(arms, "The end of training")
    assert baseline == ["baseline", "2.5000, 3.0000, 3.5000", "\N{EN DASH}", "\N{EN DASH}"]
    gap = "+0.100 \N{PLUS-MINUS SIGN} 0.000"
    assert bags == ["bags", "2.4000, 2.9000, 3.4000", gap, "175"]


def test_a_seed_without_a_pair_is_left_out(arms: list[Arm]) -> None:
    alone = arms_of([*TRACES[:3], trace("bags", 2, 2, 0.1), trace("bags", 9, 2, 7.0)])
    found = paired(alone[1], alone[0], lambda run: run.final_loss)
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.n == 1
    assert paired(Arm("none", {}), arms[0], lambda run: run.final_loss) is None


def test_positions_are_weighted_by_their_tokens(arms: list[Arm]) -> None:
    zero = "\N{PLUS-MINUS SIGN} 0.0000"
    assert [row[0] for row in rows(arms, "By position")] == ["1", "2", "3 to 4", "5 to 6", "all"]
    gaps = {row[0]: row[2] for row in rows(arms, "By position")}
    signs = np.array([1, -2, 1, -2, 1, -2])
    tokens = 10 * np.arange(1, LENGTH + 1)
    everywhere = 0.1 * (signs * tokens).sum() / tokens.sum()
    assert gaps["1"] == f"+0.1000 {zero}"
    assert gaps["2"] == f"\N{MINUS SIGN}0.2000 {zero}"
    assert gaps["5 to 6"] == f"{0.1 * (5 - 12) / 11:+.4f} {zero}".replace("-", "\N{MINUS SIGN}")
    assert gaps["all"] == f"{everywhere:+.4f} {zero}".replace("-", "\N{MINUS SIGN}")


def test_an_offset_is_the_place_of_the_predicted_token_in_its_bag(arms: list[Arm]) -> None:
    # One token is seen: the second of the first bag is predicted.
    zero = "\N{PLUS-MINUS SIGN} 0.0000"
    found = {row[0]: row[2] for row in rows(arms, "By offset")}
    assert found["1 of 2"] == f"\N{MINUS SIGN}0.2000 {zero}"
    assert found["2 of 2"] == f"+0.1000 {zero}"


def test_the_loss_after_the_switch(arms: list[Arm]) -> None:
    found = {row[0]: row[3] for row in rows(arms, "After the switch")}
    zero = "\N{PLUS-MINUS SIGN} 0.000"
    assert found["0"] == f"\N{MINUS SIGN}0.100 {zero}"
    assert found["200"] == f"+0.100 {zero}"


def test_an_arm_is_back_where_it_comes_under_to_stay() -> None:
    """As in reports of studies: a touch that is lost again is none."""

    def steps(*lost: int, **losses: float) -> str:
        at = {(VALIDATION, int(step[2:]), ""): loss for step, loss in losses.items()}
        changed = [
            replace(one, values={**one.values, **at}) if one.seed in lost else one
            for one in TRACES[3:]
        ]
        return rows(arms_of([*TRACES[:3], *changed]), "The end of training")[1][-1]

    assert steps() == "175"
    # Over the baseline at the end, by one seed and by all.
    assert steps(2, at1000=9.0) == "175 in 2 of 3"
    assert steps(*SEEDS, at1000=9.0) == "not in 3 seeds"
    # Between 500 and 1000, which are too far apart for a straight line.
    assert steps(*SEEDS, at500=9.0) == "200 to 700"
    fewer = arms_of([*TRACES[:3], *TRACES[4:]])
    assert rows(fewer, "The end of training")[1][-1] == "175 (n = 2 of 3)"


def test_steps_around_the_switch(arms: list[Arm]) -> None:
    found = {row[0]: row[1:3] for row in rows(arms, "Around the switch")}
    assert found["\N{MINUS SIGN}49 to 0"] == ["1.000", "1.000"]
    assert found["1 to 5"] == found["101 to 200"] == ["1.000", "1.100"]


def test_second_moments_over_their_later_value(arms: list[Arm]) -> None:
    assert moment_ratio(arms[1], "weight", SWITCH, SWITCH + 10) == pytest.approx(1.1**10)
    found = rows(arms, "Adam's second moments")
    assert found[1] == ["bags", "weight", f"{1.1**200:.2f}", f"{1.1**190:.2f}"]


def test_what_was_not_measured_has_no_table() -> None:
    bare = [
        Trace(name, 1, TOTAL, switch, 1, None, "m", "c", {(VALIDATION, TOTAL, ""): 2.0})
        for name, switch in (("baseline", None), ("bags", SWITCH))
    ]
    assert [section.title for section in sections(arms_of(bare))] == ["The end of training"]


def test_a_table_has_all_of_a_run(tmp_path: Path) -> None:
    for name in ("traces.csv", "traces.parquet"):
        write_traces(TRACES, tmp_path / name)
        found = read_traces(tmp_path / name)
        assert [vars(each) | {"values": 0} for each in found] == [
            vars(each) | {"values": 0} for each in TRACES
        ]
        for each, expected in zip(found, TRACES, strict=True):
            assert each.values == pytest.approx(expected.values, rel=1e-9)


def test_runs_that_are_no_arm() -> None:
    with pytest.raises(UsageError, match="two runs of seed 1"):
        arms_of([TRACES[0], TRACES[0]])
    with pytest.raises(UsageError, match="switch step None and 300"):
        arms_of([TRACES[0], trace("baseline", 2, 2, 0.1)])


SETTINGS: dict[str, Setting] = {
    "data_path": "corpus",
    "hidden_size": 64,
    "learning_rate": 1e-3,
    "global_batch_size": 8,
    "total_steps": TOTAL,
    "device": "CPU",
    "swiglu": True,
}


def with_settings(arm: str, **changes: Setting) -> list[Trace]:
    settings = {**SETTINGS, "bag_size": 1 if arm == "baseline" else 2, **changes}
    return [replace(one, settings=dict(settings)) for one in TRACES if one.arm == arm]


def test_runs_that_differ_in_more_than_their_seed_are_no_arm() -> None:
    first, *rest = with_settings("baseline")
    for changes, named in (
        ({"learning_rate": 2e-3}, r"learning_rate \(0\.001, not 0\.002\)"),
        ({"swiglu": False, "hidden_dropout": 0}, r"swiglu \(True, not off\)"),
        ({"device": "GPU"}, r"device \(CPU, not GPU\)"),
    ):
        changed = [replace(one, settings={**one.settings, **changes}) for one in rest]
        with pytest.raises(UsageError, match=f"--arm baseline: its runs differ in {named}: pass"):
            arms_of([first, *changed])


@pytest.mark.parametrize("setting", ["data_path", "hidden_size"])
def test_arms_of_another_model_or_corpus_are_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=rf"baseline and --arm bags cannot be .* {setting} \("):
        arms_of([*with_settings("baseline"), *with_settings("bags", **{setting: "other"})])


def test_losses_of_two_texts_are_refused() -> None:
    other = [replace(one, text="other") for one in TRACES if one.arm == "bags"]
    with pytest.raises(UsageError, match=r"SHA-256 text\.\.\. \(--arm baseline\) and other"):
        arms_of([*TRACES[:3], *other])
    # Measured without it.
    arms_of([*TRACES[:3], *(replace(one, text=None) for one in other)])


def test_what_arms_differ_in_is_said() -> None:
    title = "What the arms differ in"
    changes: dict[str, Setting] = {"learning_rate": 2e-3, "no_load_optim": True}
    bags = with_settings("bags", **changes)
    for one in bags:
        # Not recorded.
        del one.settings["device"]
    arms = arms_of([*with_settings("baseline"), *bags])
    named = "learning_rate (0.002, not 0.001), no_load_optim (True, not off)"
    assert rows(arms, title) == [["bags", named]]
    assert not unrecorded(arms)
    equal = arms_of([*with_settings("baseline"), *with_settings("bags")])
    assert title not in [section.title for section in sections(equal)]
    mixed = arms_of([*with_settings("baseline"), *TRACES[3:]])
    assert title not in [section.title for section in sections(mixed)]
    assert unrecorded(mixed).startswith("3 of 6 runs did not record their settings")
    # Equal or not, the length is told by every run.
    shorter = [replace(one, total_steps=TOTAL - 1) for one in TRACES[3:]]
    assert "total_steps" in rows(arms_of([*TRACES[:3], *shorter]), title)[0][1]


def test_a_gap_of_fewer_seeds_says_so() -> None:
    arms = arms_of([*TRACES[:3], *TRACES[4:]])
    _, bags = rows(arms, "The end of training")
    assert [cell[-12:] for cell in bags[2:]] == [" (n = 2 of 3)"[-12:]] * 2
    for title in ("By position", "After the switch"):
        for row in rows(arms, title):
            assert " (n = 2 of 3)" in row[-1]


def test_settings_outlive_a_table(tmp_path: Path) -> None:
    traces = [*with_settings("baseline"), *TRACES[3:]]
    for name in ("traces.csv", "traces.parquet"):
        write_traces(traces, tmp_path / name)
        assert [each.settings for each in read_traces(tmp_path / name)] == [
            each.settings for each in traces
        ]
    text = (tmp_path / "traces.csv").read_text()
    (tmp_path / "traces.csv").write_text(text.replace('"{""data_path', '"[""data_path'))
    with pytest.raises(UsageError, match="settings of baseline, seed 1, are no JSON object"):
        read_traces(tmp_path / "traces.csv")


def test_a_table_without_the_row_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "traces.csv"
    write_traces(TRACES[:1], path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(UsageError, match="no run row"):
        read_traces(path)
    path.write_text(lines[0])
    with pytest.raises(UsageError, match="holds no runs"):
        read_traces(path)
