"""Evaluates each checkpoint of a run while the run writes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_tst.checkpoint.evaluated import read_saved, run_on
from megatron_tst.checkpoint.hf_export import read_tokenizer
from megatron_tst.checkpoint.torch_dist_index import whole_checkpoints
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.evaluate import Evaluation
from megatron_tst.evaluation.results import Results
from megatron_tst.evaluation.step_table import StepTable


def follow(
    evaluation: Evaluation,
    table: StepTable,
    run: Path,
    tokenizer: Path,
    seconds: float,
    new_display: Callable[[], AbstractContextManager[TaskProgress]],
    on_row: Callable[[Results], None],
) -> None:
    """Evaluates the checkpoints that a table lacks, the earliest first, until the run's last step.

    A checkpoint that is deleted or written anew meanwhile is left for later, if it is there then.

    Args:
        evaluation: of each checkpoint.
        table: takes a line for each.
        run: folder of ``--save``; it need not exist yet.
        tokenizer: folder of the Hugging Face tokenizer.
        seconds: between two looks at the folder.
        new_display: shows how far the evaluation of one checkpoint is.
        on_row: called with each new line.

    Raises:
        UsageError: the tokenizer is none, or a checkpoint that stays cannot be evaluated.
    """
    read_tokenizer(tokenizer)
    is_waiting = False
    while True:
        missing = [
            folder for step, folder in whole_checkpoints(run).items() if step not in table.steps
        ]
        if not missing and table.has_last_step:
            return
        with new_display() as display:
            if missing:
                row = _evaluate_unless_changed(
                    evaluation, table, missing[0], tokenizer, seconds, display
                )
                is_waiting = False
                if row is not None:
                    table.add(row)
                    on_row(row)
            elif not is_waiting:
                display.say(f"waiting for a checkpoint in {run}, every {seconds:g} s")
                is_waiting = True
        if not missing:
            time.sleep(seconds)


def _evaluate_unless_changed(
    evaluation: Evaluation,
    table: StepTable,
    folder: Path,
    tokenizer: Path,
    seconds: float,
    display: TaskProgress,
) -> Results | None:
    """None if the files of the checkpoint changed meanwhile."""
    before = _files(folder)
    try:
        saved = read_saved(folder)
        warns = saved.phase not in table.phases
        results, _ = run_on(evaluation, saved, tokenizer, display, warns)
    except (UsageError, OSError):
        # Time for what goes on to be seen: a folder is deleted file by file.
        time.sleep(seconds)
        if _files(folder) == before:
            raise
        results = None
    # What was deleted since has been read whole.
    if results is None or not _files(folder).items() <= before.items():
        display.say(f"{folder} was deleted or written while it was read, and is left out")
        return None
    return results


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file; empty where there is no folder."""
    found = {}
    for file in folder.glob("*"):
        try:
            state = file.stat()
        except FileNotFoundError:
            continue
        found[file.name] = state.st_size, state.st_mtime_ns
    return found
