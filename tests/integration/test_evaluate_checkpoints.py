"""Evaluation of a run's checkpoints, one by one and while the run writes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.hf_export import export_to_huggingface
from megatron_tst.commands.evaluate import main
from tests.runs import SmallRun
from tests.zygote import Launcher

STEPS, SWITCH = (2, 4, 6), 4
# Sequences of 4, of 32 places.
TOKENS = {2: 2 * 4 * 32 * 4, 4: 4 * 4 * 32 * 4, 6: 4 * 4 * 32 * 4 + 2 * 4 * 32}


def small(corpus: Path, folder: Path) -> SmallRun:
    return SmallRun(corpus, folder).with_(
        tst_bag_size=4, tst_steps=SWITCH, train_iters=STEPS[-1], save_interval=2, eval_interval=6
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def evaluate(checkpoint):\n    return checkpoint\n" * 8)
    return path


@pytest.fixture(scope="module")
def followed(
    launcher: Launcher, corpus: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run over the switch that was followed from before its first checkpoint to its end."""
    folder = tmp_path_factory.mktemp("followed")
    run = small(corpus, folder)
    half = run.checkpoint_folder(1)
    half.mkdir(parents=True)
    (half / ".metadata").touch()
    (half / "__0_0.distcp").touch()
    training = launcher.start(run.argv, run.log)
    assert evaluate(run, text, folder / "table.jsonl", "--follow", "--seconds", 0.1) == 0
    assert launcher.wait(training) == [0]
    shutil.rmtree(half)
    return folder


@pytest.fixture
def run(followed: Path, corpus: Path, tmp_path: Path) -> SmallRun:
    """A copy of its checkpoints."""
    copied = small(corpus, tmp_path / "run")
    shutil.copytree(followed / "checkpoints", copied.folder / "checkpoints")
    return copied


@pytest.fixture
def keeps_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell starts what runs in its background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def evaluate(run: SmallRun, text: Path, output: Path, *options: object, step: int = 0) -> int:
    save = run.folder / "checkpoints"
    paths = {
        "checkpoint": run.checkpoint_folder(step) if step else save,
        "tokenizer": f"{run.corpus}-tokenizer",
        "text": text,
        "output": output,
        "device": "cpu",
    }
    given = [f"--{name}={path}" for name, path in paths.items()]
    return main([*given, *map(str, options)])


def table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(path: Path) -> list[int]:
    return [row["checkpoint"]["step"] for row in table(path)]


def when(condition: Callable[[], object], action: Callable[[], object]) -> None:
    """Does something as soon as something is so."""

    def watch() -> None:
        while not condition():
            time.sleep(0.001)
        action()

    threading.Thread(target=watch, daemon=True).start()


def test_each_checkpoint_is_a_line_once_it_is_whole(followed: Path) -> None:
    rows = table(followed / "table.jsonl")
    saved = [row["checkpoint"] for row in rows]
    assert [one["step"] for one in saved] == list(STEPS)
    assert [one["phase"] for one in saved] == [1, 1, 2]
    assert [one["bag_size"] for one in saved] == [4, 4, 1]
    assert {one["step"]: one["data_tokens"] for one in saved} == TOKENS
    assert {one["total_steps"] for one in saved} == {STEPS[-1]}
    assert len({row["text"]["bits"] for row in rows}) == len(STEPS)
    assert not list(followed.glob(".table*"))


@pytest.mark.parametrize("step", [2, 0])
def test_a_checkpoint_is_evaluated_as_its_export(
    followed: Path,
    run: SmallRun,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    """In phase 1, and the latest one of a folder of ``--save``."""
    output = tmp_path / "results" / "out.json"
    output.parent.mkdir()
    assert evaluate(run, text, output, step=step) == 0
    printed = capsys.readouterr()
    assert ("warning: The checkpoint is from step 2, in phase 1" in printed.err) == bool(step)
    assert [file.name for file in output.parent.iterdir()] == ["out.json"]
    found = json.loads(output.read_text())
    folder = run.checkpoint_folder(step or STEPS[-1])
    assert found["checkpoint"]["folder"] == found["model"]["folder"] == str(folder)

    export_to_huggingface(folder, Path(f"{run.corpus}-tokenizer"), tmp_path / "hf")
    options = ["--text", text, "--output", tmp_path / "hf.json", "--device", "cpu"]
    assert main(list(map(str, ["--model", tmp_path / "hf", *options]))) == 0
    of_export = json.loads((tmp_path / "hf.json").read_text())
    [of_table] = [
        row
        for row in table(followed / "table.jsonl")
        if row["checkpoint"]["step"] == (step or STEPS[-1])
    ]
    assert found["text"] == of_export["text"] == of_table["text"]
    assert found["model"]["sha256"] == of_export["model"]["sha256"]
    # And an evaluation of a checkpoint can be compared with.
    assert evaluate(run, text, output, "--overwrite", "--compare", tmp_path / "hf.json") == 0
    assert "difference" in capsys.readouterr().out


@pytest.mark.usefixtures("keeps_signals")
def test_a_table_goes_on_where_it_was(
    run: SmallRun, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.jsonl"
    shutil.rmtree(run.checkpoint_folder(6))
    # What is damaged, and not about to be deleted, is an error.
    weights = next(run.checkpoint_folder(4).glob("*.distcp"))
    weights.rename(tmp_path / "weights")
    assert evaluate(run, text, output, "--follow", "--seconds", 0.1) == 2
    assert f"{weights.name} is missing" in capsys.readouterr().err
    assert steps(output) == [2]
    first = output.read_text()
    (tmp_path / "weights").rename(weights)
    shutil.rmtree(run.checkpoint_folder(2))
    when(lambda: steps(output) == [2, 4], lambda: os.kill(os.getpid(), signal.SIGINT))
    assert evaluate(run, text, output, "--follow", "--seconds", 0.1) == 130
    printed = capsys.readouterr()
    assert "table.jsonl has 2 checkpoints, and the same command goes on" in printed.err
    lines = [line.split(" | ")[:4] for line in printed.out.splitlines()]
    assert lines[0] == ["| step", "phase", "bag size", "tokens"]
    # The interruption may come before the second line is printed.
    assert lines[2][0] == "| 2"
    assert output.read_text().startswith(first)


def test_a_finished_run_is_evaluated_and_that_is_all(
    followed: Path, run: SmallRun, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any checkpoint left: nothing is evaluated again."""
    output = followed / "table.jsonl"
    before = output.read_text()
    hidden = followed / "hidden"
    (followed / "checkpoints").rename(hidden)
    try:
        followed_run = SmallRun(run.corpus, followed)
        assert evaluate(followed_run, text, output, "--follow") == 0
    finally:
        hidden.rename(followed / "checkpoints")
    assert output.read_text() == before
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(STEPS)


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(
    run: SmallRun, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``--save-retain-interval`` does it: file by file."""
    output = tmp_path / "table.jsonl"
    folder = run.checkpoint_folder(4)
    next(folder.glob("*.distcp")).unlink()

    def delete_the_rest() -> None:
        time.sleep(0.5)
        shutil.rmtree(folder)

    when(lambda: steps(output) == [2], delete_the_rest)
    assert evaluate(run, text, output, "--follow", "--seconds", 2) == 0
    assert steps(output) == [2, 6]
    assert "iter_0000004 was deleted or written while it was read" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--follow"]])
@pytest.mark.usefixtures("keeps_signals")
def test_an_evaluation_that_is_ended_leaves_no_export(
    run: SmallRun, text: Path, tmp_path: Path, signum: signal.Signals, options: list[str]
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    when(lambda: list(folder.iterdir()), lambda: os.kill(os.getpid(), signum))
    try:
        # Long enough to be met in the middle.
        code: object = evaluate(run, text, folder / "out.json", "--stride", 1, *options)
    except SystemExit as end:
        code = end.code
    assert code == 128 + signum
    assert not list(folder.iterdir())


def test_what_is_refused(
    followed: Path,
    run: SmallRun,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, output, made = run.folder / "checkpoints", tmp_path / "out", followed / "table.jsonl"
    tokenizer, follow = ("--tokenizer", f"{run.corpus}-tokenizer"), ("--follow", "--text", text)
    checkpoint = ("--checkpoint", save)
    other_text = tmp_path / "other.txt"
    other_text.write_text("other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jsonl").write_text("words")
    (tmp_path / "object.jsonl").write_text("{}\n")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "pass --model with a Hugging Face folder or --checkpoint with a checkpoint: neither"),
        (("--model", "m", *checkpoint, *tokenizer), f"both (m and {save}) is given"),
        (checkpoint, "has no tokenizer in it: pass --tokenizer"),
        (("--model", "m", *tokenizer), "--model m has its own; leave it out"),
        ((*checkpoint, "--tokenizer", tmp_path / "empty"), "holds no Hugging Face tokenizer"),
        ((*checkpoint, "--tokenizer", tmp_path / "empty", "--follow"), "holds no Hugging Face"),
        (("--checkpoint", tmp_path / "empty", *tokenizer), "holds no torch_dist checkpoint"),
        (("--checkpoint", tmp_path / "none", *tokenizer), "none is not a folder"),
        (("--model", "m", "--follow"), "--follow needs --checkpoint with the --save folder"),
        ((*checkpoint, *tokenizer, "--seconds", 3), "--seconds 3 is for --follow"),
        ((*checkpoint, *tokenizer, *follow, "--seconds", 0), "--seconds 0: use a number"),
        ((*checkpoint, *tokenizer, *follow, "--compare", "m"), "--compare m: --follow compares"),
        (
            ("--checkpoint", run.checkpoint_folder(2), *tokenizer, *follow),
            "is one checkpoint: with --follow pass the folder of --save",
        ),
        (
            (*checkpoint, *tokenizer, *follow, "--output", tmp_path / "words.jsonl"),
            "words.jsonl cannot be read as JSON lines",
        ),
        (
            (*checkpoint, *tokenizer, *follow, "--output", tmp_path / "object.jsonl"),
            "object.jsonl is no table of tst evaluate --follow",
        ),
        ((*checkpoint, *tokenizer, *follow, "--output", made), "is the table of another run"),
        (
            (
                *("--checkpoint", followed / "checkpoints", *tokenizer, "--follow"),
                *("--text", other_text, "--output", made),
            ),
            "was made with text_sha256",
        ),
    ]
    for arguments, message in cases:
        options = [*arguments, *([] if "--text" in arguments else ["--text", text])]
        if "--output" not in arguments:
            options += ["--output", output]
        assert main(list(map(str, options))) == 2, arguments
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
        assert not output.exists()
