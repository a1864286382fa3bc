"""The tables and figures in docs/ are those of the committed results, and the text quotes them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_tst.commands.compare_runs import main
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.study.config import read_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/proxy.csv"
TABLES = ROOT / "docs/results/proxy.md"
FIGURES = sorted((ROOT / "docs/images/results").glob("*.png"))
PAGE = (ROOT / "docs/results.md").read_text()
# A gap, with its interval if it has one, as the tables print it.
GAPS = re.findall(
    "[+\N{MINUS SIGN}][0-9][.][0-9]{3}(?: \N{PLUS-MINUS SIGN} [0-9][.][0-9]{3})?", PAGE
)


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    outputs = ["--tables", folder / "proxy.md", "--figures", folder]
    command = [RESULTS, "--output", folder / "proxy.html", *outputs]
    assert main([str(part) for part in command]) == 0
    return folder


@pytest.fixture(scope="module")
def runs() -> list[RunResult]:
    return read_results(RESULTS)


def test_the_tables_are_those_of_the_results(regenerated: Path) -> None:
    assert (regenerated / "proxy.md").read_text() == TABLES.read_text()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_that_of_the_results(regenerated: Path, figure: Path) -> None:
    drawn, committed = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float)
        for path in (regenerated / figure.name, figure)
    )
    assert drawn.shape == committed.shape
    # Another processor may round a coordinate otherwise, which shades an edge by a little; a
    # marker that moved changes a hundred pixels from one colour to another.
    changed = np.abs(drawn - committed).max(axis=2) > 64
    assert changed.sum() < 30


def test_the_page_shows_every_figure() -> None:
    assert {f"images/results/{figure.name}" for figure in FIGURES} == set(
        re.findall(r"\]\((images/results/[^)]+)\)", PAGE)
    )


def test_the_page_quotes_the_tables() -> None:
    tables = TABLES.read_text()
    assert len(GAPS) > 30
    assert [quoted for quoted in GAPS if quoted not in tables] == []


def test_the_page_quotes_final_losses(runs: list[RunResult]) -> None:
    quoted = set(re.findall(r"\b1[.][0-9]{3}\b", PAGE))
    assert len(quoted) > 10
    assert quoted <= {f"{run.final_loss:.3f}" for run in runs}


def test_the_page_quotes_the_losses_of_phase_1(runs: list[RunResult]) -> None:
    (paragraph,) = re.findall(r"From step 500 to the switch at 900 .*?\n\n", PAGE, re.DOTALL)
    means = []
    for bag_size in (6, 8, 12, 2, 3, 4):
        name = f"127k-3000steps-lr0.002-s{bag_size}-r0.3-seed"
        losses = [
            run.training_loss[(run.training_steps >= 500) & (run.training_steps <= 900)]
            for run in runs
            if run.name.startswith(name)
        ]
        assert len(losses) == 3
        means.append(f"{np.concatenate(losses).mean():.2f}")
    assert re.findall(r"\b[23][.][0-9]{2}\b", paragraph.replace("3.32", "")) == means


def test_the_runs_are_those_of_the_study_file(runs: list[RunResult]) -> None:
    laid_out = {run.name for run in read_study(ROOT / "examples/studies/proxy.yaml").runs()}
    assert {run.name for run in runs} == laid_out
    assert {run.status for run in runs} <= {"finished", "diverged"}


def test_the_runs_saw_one_text(runs: list[RunResult]) -> None:
    assert len({tuple(sorted(run.data.items())) for run in runs}) == 1
