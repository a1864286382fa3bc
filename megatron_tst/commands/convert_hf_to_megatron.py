"""Converts a Hugging Face model (Llama, Qwen3, Qwen2-MoE, GLM-4 MoE) to a Megatron checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from megatron_tst.checkpoint.hf_export import DtypeName
from megatron_tst.checkpoint.hf_import import ImportResult, ModelKind, import_from_huggingface
from megatron_tst.checkpoint.output_folder import saying_what_is_left
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.common.progress import TaskProgress


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that is no use."""
    options = _parser().parse_args(arguments)
    with (
        saying_what_is_left(options.output),
        TaskProgress(Console(stderr=True), with_bars=options.progress) as display,
    ):
        result = import_from_huggingface(
            options.model,
            options.output,
            dtype=options.dtype,
            vocabulary_multiple=options.pad_vocab_to_multiple_of,
            overwrite=options.overwrite,
            on_progress=display.counting("Importing", "parts"),
            kind=options.model_kind,
        )
    _print(result, options.model, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json and safetensors")
    add("--output", type=Path, required=True, help="folder to write, for --load")
    add("--dtype", choices=get_args(DtypeName), help="of the weights (default: as in --model)")
    add(
        "--model-kind",
        choices=get_args(ModelKind),
        default="auto",
        help="HybridModel or GPTModel, which Megatron has deprecated (default: hybrid, but gpt for "
        "the scaled RoPE of Llama 3.1, which HybridModel leaves out)",
    )
    add(
        "--pad-vocab-to-multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="add rows of zeros to the embedding and the output layer: a multiple of "
        "--tensor-model-parallel-size, and best of 128 times it (default: 1, no rows)",
    )
    add("--overwrite", action="store_true", help="replace an earlier import, and nothing else")
    add("--progress", action="store_true", help="draw a bar, not lines, without a terminal too")
    return parser


def _print(result: ImportResult, model: Path, output: Path) -> None:
    shape = result.shape
    print(
        f"# {model}: {shape.architecture}, {result.parameters:,} parameters, vocabulary "
        f"{shape.vocabulary:,} in {shape.padded_vocabulary:,} rows, for Megatron's "
        f"{'HybridModel' if result.hybrid else 'GPTModel'}"
    )
    print("# Training starts at step 0 from these weights:")
    print("MODEL_ARGS=(")
    for argument in (*result.arguments, ("--load", str(output.absolute()))):
        print(f"    {shlex.join(argument)}")
    print(")")
