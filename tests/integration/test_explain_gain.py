"""tools/explain_gain.py on real runs: its numbers are those of the runs, and it pairs by seed."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.commands import evaluate
from megatron_tst.commands.explain_gain import main
from megatron_tst.report.origins import (
    GRADIENT,
    MOMENT,
    POSITION,
    POSITION_TOKENS,
    TEXT,
    TRAINING,
    VALIDATION,
    Trace,
    read_traces,
)
from tests.runs import TOTAL_STEPS, SmallRun
from tests.zygote import Launcher

SWITCH, SEEDS = 4, (11, 12)
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "bags of 2": {"tst_bag_size": 2, "tst_steps": SWITCH},
}
Runs = dict[tuple[str, int], SmallRun]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def evaluate(checkpoint):\n    return checkpoint\n" * 8)
    return path


@pytest.fixture(scope="module")
def runs(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    made = {
        (name, seed): SmallRun(corpus, root / f"{name}-{seed}".replace(" ", "-")).with_(
            seed=seed, save_interval=4, **flags
        )
        for name, flags in ARMS.items()
        for seed in SEEDS
    }
    for run in made.values():
        launcher.run(run.argv, run.log)
    return made


@pytest.fixture(scope="module")
def explained(runs: Runs, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    assert main([*arms(runs), *measuring(runs, text), *outputs(folder)]) == 0
    return folder


def arms(runs: Runs) -> list[str]:
    return [
        part
        for name in ARMS
        for part in ("--arm", name, *(str(runs[name, seed].folder) for seed in SEEDS))
    ]


def measuring(runs: Runs, text: Path) -> list[str]:
    corpus = next(iter(runs.values())).corpus
    return ["--text", str(text), "--tokenizer", f"{corpus}-tokenizer"]


def outputs(folder: Path) -> list[str]:
    return [
        *("--output", str(folder / "explained.csv")),
        *("--tables", str(folder / "explained.md")),
        *("--figures", str(folder / "figures")),
    ]


def traces(folder: Path) -> dict[tuple[str, int], Trace]:
    return {(found.arm, found.seed): found for found in read_traces(folder / "explained.csv")}


def test_losses_by_position_average_to_the_loss_that_is_evaluated(
    explained: Path, runs: Runs, text: Path, tmp_path: Path
) -> None:
    for key, run in runs.items():
        output = tmp_path / f"{key[1]}-{len(key[0])}.json"
        source = ["--checkpoint", str(run.checkpoint_folder(TOTAL_STEPS)), *measuring(runs, text)]
        evaluated = [*source, "--output", str(output), "--window", "32", "--stride", "32"]
        assert evaluate.main(evaluated) == 0
        of_text = json.loads(output.read_text())["text"]
        expected = of_text["bits"] * math.log(2) / of_text["tokens"]
        # The table has six digits; the other batches differ in the last bits of float32.
        found = traces(explained)[key]
        losses = found.places(POSITION, TOTAL_STEPS)
        tokens = found.places(POSITION_TOKENS, TOTAL_STEPS)
        assert [*losses] == [*tokens] == [str(place) for place in range(1, 33)]
        assert sum(tokens.values()) == of_text["tokens"]
        total = sum(loss * tokens[place] for place, loss in losses.items())
        assert total / of_text["tokens"] == pytest.approx(expected, rel=3e-6)
        assert found.series(TEXT)[TOTAL_STEPS] == pytest.approx(expected, rel=3e-6)


def test_the_scalars_are_those_that_the_runs_logged(explained: Path, runs: Runs) -> None:
    tags = {GRADIENT: "grad-norm", TRAINING: "lm loss", VALIDATION: "lm loss validation"}
    for key, run in runs.items():
        scalars = run.scalars()
        for quantity, tag in tags.items():
            assert traces(explained)[key].series(quantity) == pytest.approx(scalars[tag], rel=1e-5)


def test_the_second_moments_are_those_of_the_checkpoints(explained: Path, runs: Runs) -> None:
    for key, run in runs.items():
        for step in (SWITCH, 8, TOTAL_STEPS):
            found = traces(explained)[key].places(MOMENT, step)
            saved = {
                name.split("exp_avg_sq.")[1]: float(value.double().mean())
                for name, value in run.checkpoint(step).items()
                if "exp_avg_sq" in name
            }
            assert found == pytest.approx(saved, rel=1e-5)
            assert len(found) == 9


def test_a_table_is_read_again_as_it_was_written(explained: Path, tmp_path: Path) -> None:
    assert main([str(explained / "explained.csv"), *outputs(tmp_path)]) == 0
    for name in ("explained.csv", "explained.md"):
        assert (tmp_path / name).read_bytes() == (explained / name).read_bytes()
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    plots = ("positions", "switch-gradients", "switch-losses")
    assert drawn == [f"{plot}.{form}" for plot in plots for form in ("pdf", "png")]


def test_tables_of_some_seeds_are_joined(explained: Path, tmp_path: Path) -> None:
    with (explained / "explained.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    parts = []
    for seed in SEEDS:
        parts.append(tmp_path / f"{seed}.csv")
        with parts[-1].open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if row[1] == str(seed))])
    assert main([*map(str, parts), "--tables", str(tmp_path / "joined.md")]) == 0
    assert (tmp_path / "joined.md").read_text() == (explained / "explained.md").read_text()


def test_a_continuation_that_logged_more_is_joined_with_its_run(runs: Runs, tmp_path: Path) -> None:
    run = runs["bags of 2", SEEDS[0]]
    alone = tmp_path / "alone"
    shutil.copytree(run.folder / "tensorboard", alone / "tensorboard")
    baseline = str(runs["baseline", SEEDS[0]].folder)
    command = ["--arm", "baseline", baseline, "--arm", "bags of 2", str(alone), str(run.folder)]
    assert main([*command, "--output", str(tmp_path / "explained.csv")]) == 0
    _, found = read_traces(tmp_path / "explained.csv")
    assert found.places(MOMENT, SWITCH)


def test_an_arm_that_was_measured_alone_is_joined(
    explained: Path, runs: Runs, text: Path, tmp_path: Path
) -> None:
    later = ["--arm", "later", str(runs["bags of 2", SEEDS[0]].folder), *measuring(runs, text)]
    assert main([*later, "--output", str(tmp_path / "later.csv")]) == 0
    joined = [str(explained / "explained.csv"), str(tmp_path / "later.csv")]
    assert main([*joined, "--output", str(tmp_path / "joined.csv")]) == 0
    found = {(each.arm, each.seed): each for each in read_traces(tmp_path / "joined.csv")}
    assert len(found) == 5
    assert found["later", SEEDS[0]].values == found["bags of 2", SEEDS[0]].values


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "pass --arm for each setting"),
        (["--arm", "baseline", "RUN"], "pass --output"),
        (["--arm", "baseline", "RUN", "--arm", "bags of 2"], "--arm bags of 2 has no runs"),
        (["--arm", "a", "RUN", "--arm", "a", "RUN"], "--arm a is given twice"),
        (["--arm", "a", "RUN", "--arm", "b", "TST"], "pass --output"),
        (
            ["--arm", "a", "RUN", "--arm", "b", "TST", "--text", "x", "--output", "OUT"],
            "--tokenizer",
        ),
        (["--arm", "a", "RUN", "TST", "--arm", "b", "TST", "--output", "OUT"], "--arm a: its runs"),
        (["TABLE", "TABLE"], "two runs of seed 11"),
        (["TABLE", "--text", "x", "--tokenizer", "y"], "has its numbers"),
        (["--arm", "a", "/nowhere", "--arm", "b", "TST", "--output", "OUT"], "/nowhere"),
    ],
)
def test_input_that_cannot_be_used(
    runs: Runs,
    explained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    message: str,
) -> None:
    paths = {
        "RUN": runs["baseline", SEEDS[0]].folder,
        "TST": runs["bags of 2", SEEDS[1]].folder,
        "OUT": tmp_path / "out.csv",
        "TABLE": explained / "explained.csv",
    }
    assert main([str(paths.get(part, part)) for part in command]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
