"""A study goes on from a table of results where the folder of its runs is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tst.common.errors import UsageError
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.study.config import StudyConfig, read_study
from megatron_tst.study.earlier_results import in_order_of, read_earlier_results, without
from tests.zygote import ROOT

TABLE = ROOT / "docs/results/long.csv"


@pytest.fixture
def study() -> StudyConfig:
    found = read_study(ROOT / "examples/studies/long.yaml")
    return replace(found, arguments={**found.arguments, "bf16": True})


def test_the_committed_runs_of_a_study_are_known_and_not_run_again(study: StudyConfig) -> None:
    earlier = read_earlier_results(TABLE, study)
    assert [result.name for result in earlier] == [r.name for r in read_results(TABLE)]
    left = without(study, [result.name for result in earlier])
    assert {run.name for run in study.runs()} == {
        *(run.name for run in left.runs()),
        *(result.name for result in earlier),
    }
    assert len(left.grid) == len(study.grid) - len(earlier)
    assert left.common() == study.common()
    backwards = in_order_of(study, earlier[::-1])
    order = [run.name for run in study.runs()]
    assert [order.index(result.name) for result in backwards] == sorted(
        order.index(result.name) for result in earlier
    )


def test_controls_that_are_done_are_not_counted(study: StudyConfig) -> None:
    added = replace(study, controls=3)
    done = [run.name for run in study.grid[-2:]]
    assert without(added, done).controls == 1
    assert without(added, [study.grid[0].name]).controls == 3


def test_a_table_of_another_study_is_refused(study: StudyConfig, tmp_path: Path) -> None:
    first, *rest = read_results(TABLE)
    table = tmp_path / "table.csv"
    write_results([replace(first, name="1M-10steps-lr0.1-baseline-seed0"), *rest], table)
    with pytest.raises(UsageError, match=r"table\.csv: run 1M-10steps.* is none of the study"):
        read_earlier_results(table, study)
    changed = replace(
        first,
        settings={**first.settings, "adam_beta2": 0.98},
        data={**first.data, "data_path": "python-packages"},
    )
    write_results([*rest, changed], table)
    with pytest.raises(
        UsageError,
        match=rf"run {first.name} is of another study, which differs in adam_beta2 \(0\.98, not "
        r"0\.95\), data_path \(python-packages, not prose\): use a table of this study",
    ):
        read_earlier_results(table, study)


def test_the_precision_of_the_table_is_that_of_the_runs_to_come(study: StudyConfig) -> None:
    without_bf16 = {k: v for k, v in study.arguments.items() if k != "bf16"}
    with pytest.raises(UsageError, match=r"differs in bf16 \(True, not False\)"):
        read_earlier_results(TABLE, replace(study, arguments=without_bf16))
