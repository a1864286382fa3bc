"""Tables of results that other programs and hands have written, and what is stated of a run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_tst.report.comparison import study_of
from megatron_tst.report.families import families_of
from megatron_tst.report.origins import Trace, read_traces, write_traces
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.report.sources import read_stated
from tests.unit.run_folders import TST, make_run, tst_loss
from tests.unit.synthetic_runs import line, synthetic_run

Row = dict[str, Any]
TST_NAME = "s4-r0.25-100-seed0"


def runs() -> list[RunResult]:
    settings: dict[str, Any] = {"bf16": True, "global_batch_size": 8, "padded_vocab_size": 256}
    arms = {1: 3.0, 4: 2.9}
    return [
        synthetic_run(line(loss), bag_size=size, name=TST_NAME if size > 1 else None, **settings)
        for size, loss in arms.items()
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table of a baseline and a TST run."""
    write_results(runs(), tmp_path / "results.csv")
    return tmp_path / "results.csv"


def rewrite(path: Path, change: Callable[[Row], None]) -> None:
    """Changes the rows of a CSV file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def assert_compared(path: Path) -> None:
    """It says what the runs say that it was made of."""
    found = read_results(path)
    assert [run.settings for run in found] == [run.settings for run in runs()]
    types = [{name: type(value) for name, value in run.settings.items()} for run in found]
    assert types[1]["bag_size"] is types[1]["switch_step"] is types[1]["total_steps"] is int
    (family,) = families_of(found)
    (matchup,) = study_of(family).matchups
    assert matchup.gap is not None
    assert matchup.gap.mean == pytest.approx(0.1)
    assert matchup.tst.label == "s=4 r=0.25"


def as_pandas_writes(row: Row) -> None:
    # Columns with empty cells are of floats or objects.
    for name, value in row.items():
        row[name] = f"{value}.0" if value.isdigit() else {"true": "True"}.get(value, value)


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_a_table_that_pandas_has_written(path: Path, index: str) -> None:
    rewrite(path, as_pandas_writes)
    assert "4.0" in path.read_text()
    assert_compared(path)
    header, *lines = path.read_text().splitlines()
    numbered = [f"{i},{line}" for i, line in enumerate(lines)]
    path.write_text("\n".join([f"{index},{header}", *numbered]))
    assert_compared(path)


def test_empty_values_may_be_written_as_nan(path: Path) -> None:
    rewrite(path, lambda row: row.update({n: v or "NaN" for n, v in row.items()}))
    assert "NaN" in path.read_text()
    assert_compared(path)


def test_a_table_that_a_spreadsheet_has_written(path: Path) -> None:
    rewrite(path, lambda row: row.update(bf16=row["bf16"].upper()))
    header, *lines = path.read_text().splitlines()
    # Empty cells at the end are left out, or are more than the columns; a mark stands in front.
    lines = [line.rstrip(",") if i % 2 else f"{line},," for i, line in enumerate(lines)]
    empty = "," * header.count(",")
    path.write_text("\n".join(["\ufeff" + header, *lines, empty]), encoding="utf-8")
    assert_compared(path)


def test_a_parquet_file_of_floats_and_texts(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rewrite(path, as_pandas_writes)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole: dict[str, list[Any]] = {name: [row[name] or None for row in rows] for name in rows[0]}
    for name in ("bag_size", "switch_step", "learning_rate"):
        whole[name] = [float(value) if value else float("nan") for value in whole[name]]
    whole["__index_level_0__"] = list(range(len(rows)))
    pq.write_table(pa.table(whole), path.with_suffix(".parquet"))
    assert_compared(path.with_suffix(".parquet"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_batch_size_and_a_schedule_of_them_share_a_column(tmp_path: Path, suffix: str) -> None:
    baseline, tst = runs()
    ramped = replace(tst, settings={**tst.settings, "global_batch_size": "0:8 1024:16"})
    write_results([baseline, ramped], tmp_path / f"results.{suffix}")
    sizes = [
        run.settings["global_batch_size"] for run in read_results(tmp_path / f"results.{suffix}")
    ]
    assert sizes == [8, "0:8 1024:16"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_setting_pairs_with_what_it_was_before_the_table(tmp_path: Path, suffix: str) -> None:
    runs = [
        synthetic_run(line(3.0), bag_size=size, learning_rate=1e-3 / 3, weight_decay=0.1 * 2**0.5)
        for size in (1, 2)
    ]
    table = tmp_path / f"runs{suffix}"
    write_results(runs[:1], table)
    (family,) = families_of([*read_results(table), *runs[1:]])
    assert len(study_of(family).matchups) == 1


def test_settings_that_a_row_leaves_out(path: Path) -> None:
    """By hand a run is described in one row, without what follows, or with what has no meaning."""

    def change(row: Row) -> None:
        if row["bag_size"] == "4":
            row["step_ratio"] = ""
            if row["step"] != "50":
                row.update(dict.fromkeys(set(row) - {"run", *list(row)[2:8]}, ""))
        elif row["bag_size"]:
            row.update(bag_size="", switch_step="0", variant="full")

    rewrite(path, change)
    assert_compared(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bag_size", "-4", "bag_size is -4: write a whole number of at least 1"),
        ("bag_size", "4.5", r"bag_size is 4\.5: write a whole number"),
        ("bag_size", "true", "bag_size is True: write a whole number"),
        ("bag_size", "", "switch_step is 25 and bag_size is 1 or not given: set bag_size"),
        ("switch_step", "0.3", r"switch_step is 0\.3: write a whole number"),
        ("switch_step", "-5", "switch_step is -5"),
        ("switch_step", "0", "switch_step is 0 of 100 steps: .* 1 to 99"),
        ("switch_step", "100", "switch_step is 100 of 100 steps"),
        ("switch_step", "", "bag_size is 4 without switch_step"),
        ("switch_step", "30", r"step_ratio is 0\.25, but switch_step 30 of 100 steps is 0\.3"),
        ("total_steps", "0", "total_steps is 0: write a whole number of at least 1"),
        ("total_steps", "110", "is finished, but its last validation loss is of step 100 of 110"),
        ("seed", "1.5", r"seed is 1\.5: write a whole number"),
        ("seed", "nine", "seed is 'nine'"),
        ("step_ratio", "inf", "step_ratio is inf: write a number"),
        ("learning_rate", "fast", "learning_rate is 'fast': write a number"),
        ("lr_decay_share", "abc", "lr_decay_share is 'abc': write a number"),
        ("lr_decay_share", "0", "lr_decay_share is 0: write a number above 0"),
        ("lr_wsd_decay_samples", "abc", "lr_wsd_decay_samples is 'abc': write a whole number"),
        ("lr_warmup_samples", "-8", "lr_warmup_samples is -8: write a whole number of at least 0"),
        ("arguments", '{"lr_wsd_decay_samples":"abc"}', "lr_wsd_decay_samples is 'abc'"),
        ("parameters", "1,000", "parameters is '1,000': write a whole number"),
        ("global_batch_size", "8 to 16", "global_batch_size is '8 to 16'"),
        ("bf16", "yes", "bf16 is 'yes': write true or false"),
        ("variant", "input_only", "variant is 'input_only': choose one of full, input-only"),
        ("bags", "4:20;2:5", "bags is '4:20;2:5': write bag size:steps"),
        ("bags", "4:20+2:10", r"bags is '4:20\+2:10'.* 25 steps in all"),
        ("status", "done", "status is 'done': write finished, diverged, unfinished"),
        ("quantity", "loss", "quantity is 'loss': write validation loss"),
        ("quantity", "", "quantity is empty: write validation loss"),
        ("step", "10.5", r"step is 10\.5: write a whole number"),
        ("step", "10", "step 10 is there twice"),
        ("loss", "", "step 10: loss is empty: write a number"),
        ("loss", "inf", "step 10: loss is inf: write a number"),
        ("equivalent_tokens", "9" * 30, "equivalent_tokens is 9{30}: write a whole number"),
        ("loss", "3,1", "step 10: loss is '3,1': write a number"),
        ("equivalent_tokens", "", "step 10: equivalent_tokens is empty: write a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_run_and_column(
    path: Path, name: str, value: str, message: str
) -> None:
    def change(row: Row) -> None:
        if row["bag_size"] == "4":
            row[name] = value

    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"results\.csv: run {TST_NAME}.*{message}"):
        read_results(path)


def test_tokens_that_fall_are_refused(path: Path) -> None:
    rewrite(path, lambda row: row.update({"data_tokens": "150"} if row["step"] == "20" else {}))
    with pytest.raises(ValueError, match=r"step 20: data_tokens is 150: .* of at least 160"):
        read_results(path)


def test_two_runs_of_one_name_are_refused(path: Path) -> None:
    text = path.read_text()
    path.write_text(text + text.split("\n", 1)[1])
    with pytest.raises(ValueError, match="validation loss: step 10 is there twice"):
        read_results(path)
    path.write_text(text)
    rewrite(path, lambda row: row.update(run="one"))
    with pytest.raises(ValueError, match=r"run one: its rows have bag_size 1 and 4"):
        read_results(path)
    path.write_text(text)
    rewrite(path, lambda row: row.update(run="" if row["step"] == "50" else row["run"]))
    with pytest.raises(ValueError, match="a row without run: validation loss, step 50"):
        read_results(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:5], f"{lines[5]},9"], r"line 6: \d+ values for \d+ columns.*'9'"),
        (lambda lines: [line.replace(",", ";") for line in lines], "has ';' between its columns"),
        (lambda lines: [f"{line},{line}" for line in lines], "two columns .*bag_size"),
        (lambda lines: [*lines[:5], '"a'], "cannot be read as a table"),
        (lambda lines: [lines[0].replace("bag_size", "Bag size"), *lines[1:]], "write bag_size"),
        (lambda lines: [lines[0].replace("learning_rate", "lr"), *lines[1:]], "learning_rate"),
    ],
)
def test_a_table_of_another_form_is_refused(
    path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        read_results(path)


# --- what is stated of a run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorBoard folder of a stock run of 100 steps that records no argument."""
    folder = tmp_path_factory.mktemp("stock")
    writer = SummaryWriter(str(folder))
    for step in (50, 100):
        writer.add_scalar("lm loss validation", 3.0 - step / 1000, step)
    writer.close()
    return folder


def test_what_is_stated_is_read_as_it_is_meant(folder: Path) -> None:
    stated = "tokens_per_step=1.6e1,bag_size=4.0,switch_step=25.0,bf16=True,data_path=2024"
    run = read_stated(f"mine={folder},{stated},sequence_length=16,tokenizer_model=1.0")
    assert (run.bag_size, run.switch_step, run.total_steps) == (4, 25, 100)
    assert run.settings["bf16"] is True
    assert run.settings["sequence_length"] == run.data["sequence_length"] == 16
    assert (run.data["data_path"], run.data["tokenizer_model"]) == ("2024", "1.0")
    assert run.data_tokens.tolist() == [(50 + 75) * 16, (100 + 75) * 16]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("bag_size=4,switch_step=0.3", r"switch_step is 0\.3: write a whole number"),
        ("bag_size=4,switch_step=-5", "switch_step is -5"),
        ("bag_size=4,switch_step=400", "switch_step is 400 of 100 steps"),
        ("bag_size=4", "bag_size is 4 without switch_step"),
        ("bag_size=-4,switch_step=25", "bag_size is -4"),
        ("bag_size=true,switch_step=25", "bag_size is True"),
        ("switch_step=25", "switch_step is 25 and bag_size is 1 or not given"),
        ("bagsize=4,switch_step=25", "bagsize is no setting of a report: write bag_size"),
        ("tst-bag-size=4,switch_step=25", "write bag_size"),
        ("lr=0.1", "lr is no setting of a report: write learning_rate"),
        ("total_steps=0", "total_steps is 0"),
        ("tokens_per_step=0", "tokens_per_step is 0: write a number above 0"),
        ("tokens_per_step=many", "tokens_per_step is 'many': write a number"),
        ("seed=", "seed is '': write a value"),
        ("seed=1,seed=2", "states seed twice"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder: Path, stated: str, message: str) -> None:
    text = f"mine={folder},tokens_per_step=16,{stated}"
    if stated.startswith("tokens_per_step"):
        text = f"mine={folder},{stated}"
    with pytest.raises(ValueError, match=message) as caught:
        read_stated(text)
    assert str(caught.value).startswith(f"--run {text!r}")


def test_a_run_of_this_project_knows_its_phases(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TST, tst_loss)
    found = read_stated(f"mine={run},seed=3,bag_size=4,tokenizer_model=mine")
    assert (found.seed, found.data["tokenizer_model"]) == (3, "mine")
    assert "tokenizer_model" not in found.settings
    for stated in ("bag_size=2", "total_steps=50", "tokens_per_step=16"):
        with pytest.raises(ValueError, match=stated.replace("=", " is ")):
            read_stated(f"mine={run},{stated}")


# --- tables of origins ----------------------------------------------------------------------------


def traces() -> list[Trace]:
    values = {("validation loss", step, ""): 3.0 - step / 100 for step in (50, 100)}
    values[("loss of position", 100, "7")] = 2.0
    common: dict[str, Any] = {"total_steps": 100, "text": "a1", "machine": "m", "commit": "c"}
    return [
        Trace("baseline", 0, switch_step=None, bag_size=1, values=values, **common),
        Trace("s = 2", 0, switch_step=25, bag_size=2, values=values, **common),
    ]


def test_a_table_of_origins_may_be_sorted_and_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "origins.csv"
    write_traces(traces(), path)
    rewrite(path, as_pandas_writes)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *sorted(lines, key=lambda line: line.split(",")[2])]))
    found = {trace.arm: trace for trace in read_traces(path)}
    for trace in traces():
        again = found[trace.arm]
        assert again.values == trace.values
        assert repr(again.switch_step) == repr(trace.switch_step)
        assert repr((again.seed, again.total_steps)) == "(0, 100)"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "", "seed is empty: write a whole number"),
        ("step", "1.5", r"step is 1\.5: write a whole number"),
        ("step", "100", "validation loss.* of step 100 .* there twice"),
        ("value", "", "value is empty: write a number"),
        ("value", "low", "value is 'low': write a number"),
        ("quantity", "run", "is there twice"),
    ],
)
def test_a_value_of_origins_that_cannot_be_is_refused(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    path = tmp_path / "origins.csv"
    write_traces(traces(), path)
    rewrite(path, lambda row: row.update({name: value} if row["step"] == "50" else {}))
    with pytest.raises(ValueError, match=rf"origins\.csv.*{message}"):
        read_traces(path)
