"""Tokenizes text into Megatron's .bin/.idx format: see docs/data.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

from rich.console import Console

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.corpus.encoder_choice import EncoderName
from megatron_tst.corpus.file_kinds import DEFAULT_EXTENSIONS
from megatron_tst.corpus.outputs import checked_prefix
from megatron_tst.corpus.preprocessing import PreprocessConfig
from megatron_tst.corpus.preprocessing_progress import preprocess_with_progress
from megatron_tst.corpus.sources import described


def parse_arguments(arguments: Sequence[str] | None = None) -> PreprocessConfig:
    """The configuration that the command line describes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--input", dest="inputs", type=Path, nargs="+", required=True, help="files and folders")
    add("--output-prefix", required=True, help="outputs without extension")
    add("--tokenizer", type=Path, help="tokenizer.json, or a folder with one")
    add("--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE first")
    add("--byte-level", action="store_true", help="bytes as tokens, vocabulary 256")
    add("--eod-token", help="end-of-document token (default: the tokenizer's eos_token)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    add("--workers", type=int, default=_available_cpus(), help="default: %(default)s, all CPUs")
    add("--encoder", choices=get_args(EncoderName), default="auto", help="default: %(default)s")
    add("--json-key", default="text", help="JSON member or Parquet column that holds the text")
    add("--extensions", nargs="+", default=DEFAULT_EXTENSIONS, help="file extensions to read")
    add("--shuffle-seed", type=int, help="shuffle the order of the files")
    add("--max-documents", type=int, help="stop after this many documents")
    add("--max-bytes", type=int, help="stop before exceeding this much text")
    add("--max-bad-documents", type=int, default=0, help="malformed documents to leave out")
    add("--max-empty-documents", type=int, help="empty documents to leave out (default: any)")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add("--start-anew", action="store_true", help="discard an interrupted run of this prefix")
    options = vars(parser.parse_args(arguments))
    options["inputs"] = tuple(options["inputs"])
    # A path forgets the slash at its end.
    options["output_prefix"] = checked_prefix(options["output_prefix"])
    options["extensions"] = tuple(options["extensions"])
    assert options.keys() == {field.name for field in fields(PreprocessConfig)}
    return PreprocessConfig(**options)


def _available_cpus() -> int:
    # A job may own a part of the machine only; not every system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    try:
        config = parse_arguments(arguments)
        result = preprocess_with_progress(config, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what was done", file=sys.stderr)
        return 128 + signal.SIGINT
    print(
        f"{config.output('.bin')}: {result.documents:,} documents, {result.tokens:,} tokens "
        f"({result.dtype}), vocabulary {result.vocab_size:,}, end of document {result.eod_id}"
    )
    if result.empty_documents or result.bad_documents or result.skipped_files:
        print(
            f"{config.left_out_file}: left out {result.bad_documents:,} bad and "
            f"{result.empty_documents:,} empty documents, {result.skipped_files:,} files of folders"
        )
    if result.unread_files:
        print(f"not read in folders: {described(result.unread_files)}")
    return 0
