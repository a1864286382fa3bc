"""A study goes on from a table of results where the folder of its runs is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.earlier_results import (
    in_order_of,
    read_earlier_results,
    without,
)
from megatron_tst.study.study_file import read_study
from tests.zygote import ROOT

TABLE = ROOT / "docs/results/long.csv"


def never(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs that recorded no arguments: Megatron's parser is not asked."""
    raise AssertionError(arguments)


def silent() -> list[RunResult]:
    """Runs of an earlier version, which recorded no arguments."""
    return [result for result in read_results(TABLE) if not result.arguments]


def by_megatron(arguments: Sequence[str]) -> dict[str, Any]:
    return vars(parse_arguments(arguments))


@pytest.fixture
def study() -> StudyConfig:
    found = read_study(ROOT / "examples/studies/long.yaml")
    return replace(found, arguments={**found.arguments, "bf16": True})


def test_the_committed_runs_of_a_study_are_known_and_not_run_again(study: StudyConfig) -> None:
    # Some of them recorded their arguments, and some, of an earlier version, did not.
    assert {bool(result.arguments) for result in read_results(TABLE)} == {True, False}
    earlier = read_earlier_results(TABLE, study, by_megatron).results
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
    first, *rest = silent()
    table = tmp_path / "table.csv"
    write_results([replace(first, name="1M-10steps-lr0.1-baseline-seed0"), *rest], table)
    with pytest.raises(UsageError, match=r"table\.csv: run 1M-10steps.* is none of the study"):
        read_earlier_results(table, study, never)
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
        read_earlier_results(table, study, never)


def test_the_precision_of_the_table_is_that_of_the_runs_to_come(study: StudyConfig) -> None:
    without_bf16 = {k: v for k, v in study.arguments.items() if k != "bf16"}
    with pytest.raises(UsageError, match=r"differs in bf16 \(True, not False\)"):
        read_earlier_results(TABLE, replace(study, arguments=without_bf16), never)


def test_another_batch_size_is_refused(study: StudyConfig) -> None:
    larger = replace(study, arguments={**study.arguments, "global-batch-size": 16})
    with pytest.raises(UsageError, match=r"differs in global_batch_size \(8, not 16\)"):
        read_earlier_results(TABLE, larger, never)
    eight_bits = replace(study, arguments={**study.arguments, "fp8-format": "hybrid"})
    with pytest.raises(UsageError, match=r"differs in fp8 \(off, not hybrid\)"):
        read_earlier_results(TABLE, eight_bits, never)


def test_what_a_table_does_not_tell_is_named(study: StudyConfig) -> None:
    found = read_earlier_results(TABLE, study, by_megatron)
    (note,) = found.notes
    assert f"{len(silent())} of {len(found.results)} runs did not record all" in note
    assert all(flag in note for flag in ("--hidden-dropout", "--swiglu", "--normalization"))
    # The table tells these, or they cannot matter.
    assert not any(flag in note for flag in ("--lr", "--num-layers", "--micro-batch", "--log"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden-dropout": 0.1}, r"hidden_dropout \(off, not 0\.1\)"),
        ({"swiglu": None}, r"swiglu \(True, not off\)"),
        ({"normalization": None}, r"normalization \(RMSNorm, not LayerNorm\)"),
        ({"untie-embeddings-and-output-weights": None}, r"untie_\w+ \(True, not off\)"),
        ({"disable-bias-linear": None}, r"add_bias_linear \(off, not True\)"),
    ],
)
def test_a_table_with_arguments_of_another_study_is_refused(
    study: StudyConfig, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    result, run = read_results(TABLE)[0], study.runs()[0]
    assert result.name == run.name
    parsed = by_megatron(run.arguments)
    # As a run has them that has started.
    parsed |= {"accumulate_allreduce_grads_in_fp32": True, "encoder_seq_length": 128}
    table = tmp_path / "table.csv"
    write_results([replace(result, arguments=arguments_that_can_matter(parsed))], table)
    found = read_earlier_results(table, study, by_megatron)
    assert found.results[0].arguments["normalization"] == "RMSNorm"
    assert not found.notes
    kept = {name: v for name, v in study.arguments.items() if name not in changes}
    changed = {name: value for name, value in changes.items() if value is not None}
    other = replace(study, arguments={**kept, **changed})
    with pytest.raises(UsageError, match=f"another study, which differs in {named}: use"):
        read_earlier_results(table, other, by_megatron)


def test_what_the_study_leaves_to_megatron_is_told(study: StudyConfig, tmp_path: Path) -> None:
    result, run = read_results(TABLE)[0], study.runs()[0]
    recorded = arguments_that_can_matter(by_megatron(run.arguments))
    recorded |= {"mtp_num_layers": 1, "window_size": "[8, 0]", "optimizer": "muon"}
    table = tmp_path / "table.csv"
    write_results([replace(result, arguments=recorded)], table)
    (note,) = read_earlier_results(table, study, by_megatron).notes
    assert note == (
        f"--earlier {table}: runs had mtp_num_layers (1), optimizer (muon), window_size ([8, 0]), "
        "which the study leaves to Megatron."
    )


def test_a_run_that_had_not_ended_is_trained(study: StudyConfig, tmp_path: Path) -> None:
    first, second, *_ = silent()
    table = tmp_path / "table.csv"
    write_results([first, replace(second, status="unfinished")], table)
    found = read_earlier_results(table, study, never)
    assert [result.name for result in found.results] == [first.name]
    assert found.notes[0].endswith("1 of its runs had not ended, and are trained anew.")


def test_a_batch_that_grows_is_no_constant_one(study: StudyConfig, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_results(silent(), table)
    growing = replace(study, arguments={**study.arguments, "rampup-batch-size": [4, 4, 1000]})
    with pytest.raises(UsageError, match=r"differs in global_batch_size \(8, not one that grows\)"):
        read_earlier_results(table, growing, never)
