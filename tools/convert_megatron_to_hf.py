"""Converts a dense, Llama-shaped Megatron checkpoint (torch_dist) to Hugging Face format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_tst.checkpoint.hf_export import DtypeName, export_to_huggingface


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an iter_... folder, or a --save folder")
    add("--tokenizer", type=Path, required=True, help="folder of the Hugging Face tokenizer")
    add("--output", type=Path, required=True, help="folder to write")
    add("--dtype", choices=get_args(DtypeName), help="of the weights (default: as stored)")
    add("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    add("--overwrite", action="store_true", help="replace an existing output")
    try:
        result = export_to_huggingface(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"{result.checkpoint} (step {result.iteration}, {result.parameters:,} parameters, "
        f"vocabulary {result.shape.vocabulary:,} of {result.shape.padded_vocabulary:,} rows)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
