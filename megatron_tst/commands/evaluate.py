"""Evaluates a Hugging Face folder: zero-shot tasks of lm-eval, and bits per byte of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.evaluate import EvaluationConfig, evaluate
from megatron_tst.evaluation.folder import DTYPE_HELP, DtypeName
from megatron_tst.evaluation.harness import PUBLISHED_TASKS
from megatron_tst.evaluation.results import markdown_table


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder with safetensors weights")
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--tasks", nargs="+", help=f"of lm-eval (default: {' '.join(PUBLISHED_TASKS)})")
    add("--tasks-dir", type=Path, help="folder with task files of lm-eval; their code is run")
    add("--text", type=Path, help="file, or folder of files: measure bits per byte")
    add("--compare", type=Path, help="folder of a second model, or JSON of its evaluation")
    add("--limit", type=int, help="only the first samples of each task")
    add("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    add("--window", type=int, help="tokens that a prediction sees in --text (default: context)")
    add("--stride", type=int, help="tokens from window to window (default: half a window)")
    add("--dtype", choices=get_args(DtypeName), default="auto", help=DTYPE_HELP)
    add("--device", default="auto", help="default: the GPU where there is one")
    add("--overwrite", action="store_true", help="replace an existing output")
    options = vars(parser.parse_args(arguments))
    options["tasks"] = options["tasks"] and tuple(options["tasks"])
    with TaskProgress(Console(stderr=True)) as display:
        results, other = evaluate(EvaluationConfig(**options), display)
    print(markdown_table(results, other))
    return 0
