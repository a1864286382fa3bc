"""Converts a Megatron checkpoint to Hugging Face format: Llama, Qwen3, Qwen2-MoE, GLM-4 MoE."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from megatron_tst.checkpoint.hf_export import DtypeName, ExportResult, export_to_huggingface
from megatron_tst.checkpoint.hf_verify import LOGIT_TOLERANCE
from megatron_tst.checkpoint.output_folder import saying_what_is_left
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.common.progress import TaskProgress


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if --verify finds a difference, 2 for input that is no use."""
    options = _parser().parse_args(arguments)
    if options.verify:
        # Both models run on the CPU. Before anything looks for a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    written = "was written and not verified" if options.verify else "was written"
    with saying_what_is_left(options.output, written):
        result = _export(options)
        if not options.verify:
            return 0
        return _verify(result.checkpoint, options.output, options.verify_tolerance)


def _export(options: argparse.Namespace) -> ExportResult:
    with TaskProgress(Console(stderr=True), with_bars=options.progress) as display:
        result = export_to_huggingface(
            options.checkpoint,
            options.tokenizer,
            options.output,
            dtype=options.dtype,
            overwrite=options.overwrite,
            max_shard_size=options.max_shard_size,
            on_progress=display.counting("Exporting", "parts"),
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"{result.checkpoint} (step {result.iteration}, {result.parameters:,} parameters, "
        f"vocabulary {result.shape.vocabulary:,} of {result.shape.padded_vocabulary:,} rows) as "
        f"{result.shape.architecture}: {options.output}"
    )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an iter_... folder, or a --save folder")
    add("--tokenizer", type=Path, required=True, help="folder of the Hugging Face tokenizer")
    add("--output", type=Path, required=True, help="folder to write")
    add("--dtype", choices=get_args(DtypeName), help="of the weights (default: as stored)")
    add("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    add("--overwrite", action="store_true", help="replace an earlier export, and nothing else")
    add("--progress", action="store_true", help="draw a bar, not lines, without a terminal too")
    add(
        "--verify",
        action="store_true",
        help="run both models in fp32 on the CPU, on random tokens, and compare their logits "
        "(memory: 8 bytes a parameter)",
    )
    add(
        "--verify-tolerance",
        type=float,
        default=LOGIT_TOLERANCE,
        help=f"largest difference of two logits that passes (default: {LOGIT_TOLERANCE})",
    )
    return parser


def _verify(checkpoint: Path, output: Path, tolerance: float) -> int:
    # Here, because the imports take seconds.
    from transformers.utils.logging import disable_progress_bar

    from megatron_tst import cpu
    from megatron_tst.checkpoint.hf_verify import largest_logit_difference

    cpu.activate()
    disable_progress_bar()
    # It recommends another model class for every model that is built.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        difference = largest_logit_difference(checkpoint, output)
    # Not above: a difference that is no number fails.
    passes = difference <= tolerance
    print(
        f"largest difference of two logits: {difference:.2e}, "
        f"{'within' if passes else 'ABOVE'} the tolerance of {tolerance:g}"
    )
    if not passes:
        print(
            f"error: {output} does not compute what the checkpoint computes: do not use it.",
            file=sys.stderr,
        )
    return 0 if passes else 1
