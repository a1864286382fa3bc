"""Evaluates a Hugging Face folder, or checkpoints of a run: tasks of lm-eval, and text."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from megatron_tst.checkpoint.torch_dist_index import FORMAT_FILE
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.evaluate import EvaluationConfig, evaluate, prepare
from megatron_tst.evaluation.folder import DTYPE_HELP, DtypeName
from megatron_tst.evaluation.harness import PUBLISHED_TASKS
from megatron_tst.evaluation.results import Results, markdown_table
from megatron_tst.evaluation.step_table import StepTable, header_lines, table_line

_SECONDS = 30.0


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for input that cannot be used, 130 if it was interrupted."""
    options = vars(_parser().parse_args(arguments))
    options["tasks"] = options["tasks"] and tuple(options["tasks"])
    model, checkpoint, tokenizer, follows, seconds = (
        options.pop(name) for name in ("model", "checkpoint", "tokenizer", "follow", "seconds")
    )
    _check_source(model, checkpoint, tokenizer)
    _check_follow(follows, seconds, checkpoint, options["compare"])
    config = EvaluationConfig(**options)
    try:
        if follows:
            return _follow(config, checkpoint, tokenizer, seconds or _SECONDS)
        with _display() as display:
            if checkpoint is None:
                results = evaluate(config, model, display)
            else:
                # Here, because it is not needed for a folder of Hugging Face.
                from megatron_tst.checkpoint.evaluated import evaluate_checkpoint

                results = evaluate_checkpoint(config, checkpoint, tokenizer, display)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(markdown_table(*results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add: Any = parser.add_argument
    add("--model", type=Path, help="Hugging Face folder with safetensors weights")
    add("--checkpoint", type=Path, help="instead: an iter_... folder, or a --save folder")
    add("--tokenizer", type=Path, help="folder of the Hugging Face tokenizer of --checkpoint")
    add("--follow", action="store_true", help="each checkpoint of a --save folder, as it comes")
    add("--seconds", type=float, help=f"from look to look of --follow (default: {_SECONDS:g})")
    add("--output", type=Path, required=True, help="JSON file to write; JSON lines with --follow")
    add("--tasks", nargs="+", help=f"of lm-eval (default: {' '.join(PUBLISHED_TASKS)})")
    add("--tasks-dir", type=Path, help="folder with task files of lm-eval; their code is run")
    add("--text", type=Path, help="file, or folder of files: measure bits per byte")
    add("--compare", type=Path, help="folder of a second model, or JSON of its evaluation")
    add("--limit", type=int, help="only the first samples of each task")
    add("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    add("--window", type=int, help="tokens that a prediction sees in --text (default: context)")
    add("--stride", type=int, help="tokens from window to window (default: half a window)")
    add("--by-position", action="store_true", help="of --text also by the tokens that are seen")
    add("--dtype", choices=get_args(DtypeName), default="auto", help=DTYPE_HELP)
    add("--device", default="auto", help="default: the GPU where there is one")
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser


def _check_source(model: Path | None, checkpoint: Path | None, tokenizer: Path | None) -> None:
    if (model is None) == (checkpoint is None):
        found = "neither" if model is None else f"both ({model} and {checkpoint})"
        raise UsageError(
            f"pass --model with a Hugging Face folder or --checkpoint with a checkpoint: {found} "
            "is given."
        )
    if checkpoint is not None and tokenizer is None:
        raise UsageError(
            f"--checkpoint {checkpoint} has no tokenizer in it: pass --tokenizer with the folder "
            "of the Hugging Face tokenizer that the model was trained with."
        )
    if model is not None and tokenizer is not None:
        raise UsageError(f"--tokenizer {tokenizer}: --model {model} has its own; leave it out.")


def _check_follow(
    follows: bool, seconds: float | None, checkpoint: Path | None, compare: Path | None
) -> None:
    if not follows:
        if seconds is not None:
            raise UsageError(f"--seconds {seconds:g} is for --follow: pass it, or leave both out.")
        return
    if checkpoint is None:
        raise UsageError("--follow needs --checkpoint with the --save folder of a run.")
    if compare is not None:
        raise UsageError(
            f"--compare {compare}: --follow compares the checkpoints of one run; leave it out, or "
            "follow each of two runs."
        )
    if seconds is not None and not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError(f"--seconds {seconds:g}: use a number of seconds above 0.")
    if (checkpoint / FORMAT_FILE).is_file():
        raise UsageError(
            f"--checkpoint {checkpoint} is one checkpoint: with --follow pass the folder of --save "
            "that it is in."
        )


def _display() -> TaskProgress:
    return TaskProgress(Console(stderr=True))


def _follow(config: EvaluationConfig, run: Path, tokenizer: Path, seconds: float) -> int:
    from megatron_tst.checkpoint.following import follow

    evaluation = prepare(config)
    table = StepTable(config.output, run, evaluation.settings, config.overwrite)
    printed: list[Results] = []

    def show(row: Results) -> None:
        if not printed:
            print(header_lines(row))
        printed.append(row)
        print(table_line(row), flush=True)

    for row in table.rows:
        show(row)
    try:
        follow(evaluation, table, run, tokenizer, seconds, _display, show)
    except KeyboardInterrupt:
        print(
            f"interrupted: {config.output} has {len(table.rows)} checkpoints, and the same command "
            "goes on",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    return 0
