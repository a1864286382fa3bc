"""A study goes on from a table of results where the folder of its runs is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.commands import run_study
from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.describing import describe_data, describe_numerics, describe_settings
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.earlier_results import (
    in_order_of,
    read_earlier_results,
    without,
)
from megatron_tst.study.study_file import read_study
from megatron_tst.study.study_folder import RESULTS_FILE, execution_of
from tests.unit.run_folders import BASELINE, baseline_loss, make_run
from tests.zygote import ROOT

TABLE = ROOT / "docs/results/long.csv"


@cache
def committed() -> tuple[RunResult, ...]:
    return tuple(read_results(TABLE))


def silent() -> list[RunResult]:
    """Runs of an earlier version, which recorded no arguments."""
    return [result for result in committed() if not result.arguments]


def by_megatron(arguments: Sequence[str]) -> dict[str, Any]:
    return dict(_parsed(tuple(arguments)))


@cache
def _parsed(arguments: tuple[str, ...]) -> dict[str, Any]:
    return vars(parse_arguments(arguments))


def changed(study: StudyConfig, changes: dict[str, Any]) -> StudyConfig:
    """With other arguments; without those that are None."""
    kept = {
        name: {k: v for k, v in given.items() if k not in changes}
        for name, given in [("", study.arguments), *study.models.items()]
    }
    asked = {name: value for name, value in changes.items() if value is not None}
    return replace(study, arguments={**kept.pop(""), **asked}, models=kept)


def ran(study: StudyConfig) -> RunResult:
    """The first run of a study with the arguments that Megatron itself starts it with."""
    # Here, because importing Megatron takes seconds.
    from megatron.training.arguments import validate_args

    run = study.runs()[0]
    args = parse_arguments(run.arguments)
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    arguments = vars(validate_args(args))
    if arguments["full_validation"]:
        arguments["eval_iters"] = 7
    plain = (bool, int, float, str, list)
    arguments = {name: value for name, value in arguments.items() if isinstance(value, plain)}
    read = committed()[0]
    return replace(
        read,
        name=run.name,
        settings={
            **describe_settings(arguments),
            "parameters": 127296,
            "padded_vocab_size": 256,
            "bag_size": 1,
            "global_batch_size": arguments["global_batch_size"],
        },
        data=describe_data(arguments),
        numerics={**read.numerics, **describe_numerics(arguments)},
        arguments=arguments_that_can_matter(arguments),
    )


@pytest.fixture
def study() -> StudyConfig:
    found = read_study(ROOT / "examples/studies/long.yaml")
    return replace(found, arguments={**found.arguments, "bf16": True})


def test_the_committed_runs_of_a_study_are_known_and_not_run_again(study: StudyConfig) -> None:
    # Some of them recorded their arguments, and some, of an earlier version, did not.
    assert {bool(result.arguments) for result in committed()} == {True, False}
    earlier = read_earlier_results(TABLE, study, by_megatron).results
    assert [result.name for result in earlier] == [r.name for r in committed()]
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
        read_earlier_results(table, study, by_megatron)
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
        read_earlier_results(table, study, by_megatron)


def test_the_precision_of_the_table_is_that_of_the_runs_to_come(study: StudyConfig) -> None:
    without_bf16 = {k: v for k, v in study.arguments.items() if k != "bf16"}
    with pytest.raises(UsageError, match=r"differs in bf16 \(True, not False\)"):
        read_earlier_results(TABLE, replace(study, arguments=without_bf16), by_megatron)


def test_another_batch_size_is_refused(study: StudyConfig) -> None:
    larger = replace(study, arguments={**study.arguments, "global-batch-size": 16})
    with pytest.raises(UsageError, match=r"differs in global_batch_size \(8, not 16\)"):
        read_earlier_results(TABLE, larger, by_megatron)
    eight_bits = replace(study, arguments={**study.arguments, "fp8-format": "hybrid"})
    with pytest.raises(UsageError, match=r"differs in fp8 \(off, not hybrid delayed\)"):
        read_earlier_results(TABLE, eight_bits, by_megatron)


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
    result, run = committed()[0], study.runs()[0]
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


EXPERTS = {"num-experts": 4}
CUT_OFF = {"lr-decay-iters": 25400}
GROUPS = {"num-attention-heads": 4, "kv-channels": 16, "group-query-attention": True}


@pytest.mark.parametrize(
    ("had", "asks", "named"),
    [
        (
            {},
            {"adam-beta2": None, "weight-decay": None, "ffn-hidden-size": None, "split": None},
            [
                *("adam_beta2 (0.95, not 0.999)", "weight_decay (0.1, not 0.01)"),
                *("ffn_hidden_size (160, not 128)", "split (97,3,0, not 969, 30, 1)"),
            ],
        ),
        (
            {"lr-wsd-decay-style": "cosine", "kv-channels": 32, "global-batch-size": 16},
            {"lr-wsd-decay-style": None, "kv-channels": None, "global-batch-size": None},
            [
                *("lr_wsd_decay_style (cosine, not exponential)", "kv_channels (32, not 64)"),
                "global_batch_size (16, not 8)",
            ],
        ),
        (
            {**CUT_OFF, **EXPERTS, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
            {},
            [
                *("lr_decay_share (2, not off)", "num_experts (4, not off)"),
                "fp8 (hybrid tensorwise, not off)",
            ],
        ),
        (
            {},
            {**CUT_OFF, **EXPERTS},
            ["lr_decay_share (off, not 2.0)", "num_experts (off, not 4)"],
        ),
        (
            {**GROUPS, "num-query-groups": 2},
            {**GROUPS, "num-query-groups": 1},
            ["num_query_groups (2, not 1)"],
        ),
    ],
)
def test_what_one_side_leaves_to_megatron_is_compared(
    study: StudyConfig, tmp_path: Path, had: dict[str, Any], asks: dict[str, Any], named: list[str]
) -> None:
    table = tmp_path / "table.csv"
    write_results([ran(changed(study, had))], table)
    with pytest.raises(UsageError, match="which differs in ") as refusal:
        read_earlier_results(table, changed(study, asks), by_megatron)
    assert not [difference for difference in named if difference not in str(refusal.value)]


@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"adam-beta2": None, "weight-decay": None, "min-lr": None, "clip-grad": None},
            **{"ffn-hidden-size": None, "kv-channels": None, "global-batch-size": None},
            **{"split": None, "num-experts": 0, **CUT_OFF},
        },
        {"ffn-hidden-size": None, "swiglu": None, **EXPERTS},
        {**GROUPS, "num-query-groups": 2},
        {**GROUPS, "group-query-attention": None, "full-validation": True},
        {"hybrid-layer-pattern": "*-*-", "num-layers": None},
        {"hybrid-layer-pattern": "M-*-", "num-layers": None},
        {"fp8-format": "hybrid"},
        {"fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
        {
            "data-path": ["0.30", "a/x", 0.7, "b/y", "1e-1", "c/z"],
            **{"split": "1", "tokenizer-model": "tokenizers/2048"},
        },
    ],
)
def test_the_own_runs_of_a_study_are_taken(
    study: StudyConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    own, table = changed(study, changes), tmp_path / "table.csv"
    recorded = ran(own)
    for result in (recorded, replace(recorded, arguments={})):
        write_results([result], table)
        assert len(read_earlier_results(table, own, by_megatron).results) == 1


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_a_format_without_its_recipe_is_compared_alone(
    study: StudyConfig, tmp_path: Path, kind: str
) -> None:
    formats = {"fp8": ("hybrid", "e4m3"), "fp4": ("e2m1", "off")}
    first, table = silent()[0], tmp_path / "table.csv"
    named, other = formats[kind]
    own = changed(study, {f"{kind}-format": named})
    write_results([replace(first, numerics={**first.numerics, kind: named})], table)
    assert read_earlier_results(table, own, by_megatron).results
    write_results([replace(first, numerics={**first.numerics, kind: other})], table)
    with pytest.raises(UsageError, match=rf"differs in {kind} \({other}, not {named} \w+\)"):
        read_earlier_results(table, own, by_megatron)


def test_numbers_are_compared_as_far_as_a_table_keeps_them(
    study: StudyConfig, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    thirds = replace(study, grid=(replace(study.grid[0], learning_rate=1e-3 / 3),), controls=0)
    write_results([ran(thirds)], table)
    assert read_earlier_results(table, thirds, by_megatron).results
    # An earlier version kept ten digits.
    table.write_text(table.read_text().replace(repr(1e-3 / 3), "0.0003333333333"))
    assert read_earlier_results(table, thirds, by_megatron).results
    near = replace(study, grid=(replace(study.grid[0], learning_rate=3.3333331e-4),), controls=0)
    with pytest.raises(UsageError, match=r"learning_rate \(0\.0003333333333, not 0\.00033333331\)"):
        read_earlier_results(table, near, by_megatron)


def test_what_the_study_leaves_to_megatron_is_told(study: StudyConfig, tmp_path: Path) -> None:
    result, run = committed()[0], study.runs()[0]
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
    found = read_earlier_results(table, study, by_megatron)
    assert [result.name for result in found.results] == [first.name]
    assert found.notes[0].endswith("1 of its runs had not ended, and are trained anew.")


def test_a_batch_that_grows_is_no_constant_one(study: StudyConfig, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_results(silent(), table)
    growing = replace(study, arguments={**study.arguments, "rampup-batch-size": [4, 4, 1000]})
    with pytest.raises(UsageError, match=r"differs in global_batch_size \(8, not one that grows\)"):
        read_earlier_results(table, growing, by_megatron)


def test_results_of_a_table_are_not_lost_where_it_is_not_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (ROOT / "examples/studies/long.yaml").read_text()
    file, folder = tmp_path / "long.yaml", tmp_path / "out"
    file.write_text(content.replace("bf16: auto", "bf16: true"))
    table, results = tmp_path / "table.csv", folder / RESULTS_FILE
    first, second, *_ = silent()
    write_results([first, second], table)
    study = [str(file), "--output", str(folder)]
    assert run_study.main([*study, "--collect", "--earlier", str(table)]) == 0
    table.unlink()
    before = results.read_bytes()

    def train(*_: Any) -> None:
        raise AssertionError("training begins")

    monkeypatch.setattr(run_study, "run_all", train)
    monkeypatch.setattr(run_study, "submit", train)
    for mode in (["--collect"], [], ["--slurm"]):
        capsys.readouterr()
        assert run_study.main([*study, *mode]) == 2
        assert (
            f"{results} would lose {first.name}, {second.name}, whose folders are not there: pass "
            f"--earlier {results}" in capsys.readouterr().err
        )
    assert run_study.main([*study, "--collect", "--earlier", str(results)]) == 0
    assert results.read_bytes() == before
    results.write_text("run,status\n")
    assert run_study.main([*study, "--collect"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_run_of_the_folder_takes_the_place_of_one_of_a_table(
    study: StudyConfig, tmp_path: Path
) -> None:
    first, second, *_ = silent()
    results = run_study.collect(study, tmp_path, [first, second])
    runs = {run.name: run for run in study.runs()}
    for name in (first.name, second.name):
        with pytest.raises(UsageError, match=f"{results} would lose .*{second.name}, whose"):
            run_study.collect(study, tmp_path)
        run = execution_of(study, runs[name], tmp_path)
        make_run(run.folder.path, BASELINE, baseline_loss)
        run.folder.write_record(state="finished")
    run_study.collect(study, tmp_path)
    assert {result.name: len(result.steps) for result in read_results(results)} == {
        first.name: 10,
        second.name: 10,
    }
