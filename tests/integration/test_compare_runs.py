"""tools/compare_runs.py on run folders, tables and TensorBoard folders of stock Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_tst.commands.compare_runs import main
from megatron_tst.report.results_table import read_results, write_results
from tests.runs import SmallRun
from tests.unit.run_folders import (
    BASELINE,
    BATCH,
    LENGTH,
    TOTAL_STEPS,
    TST,
    baseline_loss,
    make_run,
    tst_loss,
)
from tests.unit.synthetic_runs import line, synthetic_run
from tests.zygote import Launcher

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "baseline", BASELINE, baseline_loss)
    make_run(root / "tst", TST, tst_loss, seconds_per_step=1.0)
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a sweep, with one run that diverged."""
    results = []
    for seed in (1, 2):
        for steps in (100, 200):
            end = 3.0 if steps == 100 else 2.8
            results.append(synthetic_run(line(end, steps), total_steps=steps, seed=seed))
        for size, gain in ((2, 0.1), (4, 0.05)):
            for ratio in (0.25, 0.5):
                has_diverged = (size, ratio, seed) == (4, 0.5, 2)
                results.append(
                    synthetic_run(
                        line(3.0 - gain + 0.001 * seed),
                        bag_size=size,
                        step_ratio=ratio,
                        seed=seed,
                        status="diverged" if has_diverged else "finished",
                    )
                )
    path = tmp_path_factory.mktemp("table") / "results.csv"
    write_results(results, path)
    return path


def write_stock_run(folder: Path, **changes: Any) -> Path:
    """The event file of a stock Megatron run: scalars, and the arguments as texts."""
    arguments = {
        "lr": 0.001,
        "train_iters": TOTAL_STEPS,
        "num_layers": 2,
        "hidden_size": 8,
        "seq_length": LENGTH,
        "global_batch_size": BATCH,
        "data_path": ["/elsewhere/corpus"],
        "split": "98,2,0",
        "tokenizer_type": "NullTokenizer",
        "seed": 7,
        **changes,
    }
    writer = SummaryWriter(str(folder))
    for name, value in arguments.items():
        if value is not None:
            writer.add_text(name, str(value), 0)
    for step in range(10, TOTAL_STEPS + 1, 10):
        writer.add_scalar("lm loss", baseline_loss(step), step)
        writer.add_scalar("lm loss validation", baseline_loss(step), step)
        writer.add_scalar("batch-size", BATCH, step)
        writer.add_scalar("iteration-time", 0.25, step)
    writer.close()
    return folder


def test_two_named_runs(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "new" / "report.html"
    arms = ["--baseline", str(runs / "baseline"), "--tst", str(runs / "tst")]
    assert main([*arms, "--output", str(output)]) == 0
    assert "TST is ahead in this one run" in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "report-end-of-run.png",
        "report-equal-data.png",
        "report-equal-flops.png",
        "report-offset-loss.png",
        "report-training-loss.png",
        "report-training-time.png",
        "report.html",
    ]


def test_a_folder_of_runs_and_the_table_made_of_it_say_the_same(
    runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    results = tmp_path / "results.csv"
    assert main([str(runs), "--output", str(first), "--results", str(results)]) == 0
    told = capsys.readouterr().out.split("\n\n")[0]
    assert [run.name for run in read_results(results)] == ["baseline", "tst"]
    assert main([str(results), "--output", str(second)]) == 0
    assert capsys.readouterr().out.split("\n\n")[0] == told
    assert "TST is ahead in this one run" in told


def test_a_table_becomes_a_page_and_figures(table: Path, tmp_path: Path, capsys: Capture) -> None:
    output, figures = tmp_path / "study.html", tmp_path / "figures"
    assert main([str(table), "--output", str(output), "--figures", str(figures)]) == 0
    told = capsys.readouterr().out
    assert "4 TST settings at equal FLOPs: 4 with too few seeds." in told
    # s=2 gains 0.1 of the 0.2 nats that twice the length gains: 2 ** 0.5, less the seeds' offsets.
    assert "Read from finished runs of 2 lengths, a baseline must train 1.41" in told
    names = {path.stem for path in figures.iterdir()}
    assert {"gaps", "heat-map", "over-bag-size", "over-step-ratio", "equal-loss"} <= names
    page = output.read_text()
    assert "1 of 2 runs of s=4 r=0.5 diverged and are in no mean" in page
    assert '<td class="bad">1 of 2 diverged</td>' in page


def test_the_tables_of_the_page_are_written_as_markdown(table: Path, tmp_path: Path) -> None:
    output, tables = tmp_path / "study.html", tmp_path / "tables.md"
    assert main([str(table), "--output", str(output), "--tables", str(tables)]) == 0
    text = tables.read_text()
    assert text.startswith("# 1.00 k parameters on corpus\n")
    assert "1 of 2 runs of s=4 r=0.5 diverged and are in no mean" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| s=")]
    page = output.read_text()
    assert all("<td>" + "</td><td>".join(row) in page for row in rows if "diverged" not in row[1])
    gaps = {row[0]: row[1] for row in rows if len(row) == 10}
    assert gaps["s=2 r=0.25"] == "+0.099 \N{PLUS-MINUS SIGN} 0.006"


def test_the_figures_are_the_same_every_time(table: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        output = tmp_path / name / "study.html"
        assert main([str(table), "--output", str(output)]) == 0
        pages.append({path.name: path.read_bytes() for path in output.parent.iterdir()})
    assert pages[0] == pages[1]


def test_a_stock_baseline_describes_itself(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    stock = write_stock_run(tmp_path / "stock")
    results = tmp_path / "results.csv"
    arguments = [str(stock), str(runs / "tst"), "--results", str(results)]
    assert main([*arguments, "--output", str(tmp_path / "report.html")]) == 0
    assert "TST is ahead in this one run" in capsys.readouterr().out
    baseline = read_results(results)[0]
    assert (baseline.name, baseline.seed) == ("stock", 7)
    assert baseline.equivalent_tokens[-1] == TOTAL_STEPS * BATCH * LENGTH
    assert baseline.seconds[-1] == pytest.approx(25.0)


@pytest.mark.slow
def test_a_real_stock_baseline_pairs_with_a_run_of_another_layout(
    launcher: Launcher, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    stock = SmallRun(corpus, tmp_path / "stock")
    launcher.run(stock.argv, stock.log, main="tests.stock_gpt:main")
    tst = SmallRun(corpus, tmp_path / "tst").with_(
        tst_bag_size=2, tst_steps=4, tensor_model_parallel_size=2
    )
    launcher.run(tst.argv, tst.log, world_size=2)
    folders = [str(run.folder / "tensorboard") for run in (stock, tst)]
    results, report = tmp_path / "results.csv", ["--output", str(tmp_path / "report.html")]
    assert main([*folders, *report, "--results", str(results)]) == 0
    told = capsys.readouterr().out
    assert "in this one run: validation loss" in told
    # A table keeps them together too.
    assert main([str(results), *report]) == 0
    assert "in this one run: validation loss" in capsys.readouterr().out


def test_what_a_folder_does_not_record_is_stated(tmp_path: Path, capsys: Capture) -> None:
    silent = dict.fromkeys(("seq_length", "train_iters", "data_path", "split"))
    baseline = write_stock_run(tmp_path / "a", **silent)
    tst = write_stock_run(tmp_path / "b", **silent)
    output = ["--output", str(tmp_path / "report.html")]
    assert main([str(baseline), str(tst), *output]) == 2
    assert "state the mean, sequences times sequence length" in capsys.readouterr().err
    results = tmp_path / "results.csv"
    stated = [
        *("--run", f"plain={baseline},tokens_per_step=16"),
        *("--run", f"mine={tst},tokens_per_step=16,bag_size=4,switch_step=25"),
    ]
    assert main([*stated, *output, "--results", str(results)]) == 0
    assert "the arms drew" in capsys.readouterr().out
    mine = read_results(results)[1]
    assert (mine.name, mine.settings["step_ratio"]) == ("mine", 0.25)
    assert mine.data_tokens[-1] == 25 * 64 + 75 * 16


def test_other_data_gets_a_section_of_its_own(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    stock = write_stock_run(tmp_path / "stock", split="90,10,0")
    output = tmp_path / "report.html"
    assert main([str(stock), str(runs), "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert "split 98,2,0:\nAt equal FLOPs" in told
    assert "split 90,10,0:\nNo TST run can be set against a baseline" in told
    assert output.read_text().count("<h2>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is neither a folder nor a table of results"),
        (["."], ". holds no TensorBoard event files"),
        (["--run", "folder"], "write NAME=FOLDER,KEY=VALUE"),
        (["--run", "a=none"], "none is no folder"),
        (["--baseline", "none", "--tst", "other"], "none is no folder"),
    ],
)
def test_what_is_no_run_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--output", "report.html"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_same_run_twice_is_refused(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    again = ["--run", f"copy={runs / 'tst'}"]
    assert main([str(runs), *again, "--output", str(tmp_path / "report.html")]) == 2
    assert "runs tst and copy have the same settings and seed 7" in capsys.readouterr().err
