"""Joins corpora into one, in the given order: see docs/data.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.corpus.merging import merge_corpora
from megatron_tst.corpus.outputs import checked_prefix, with_suffix


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for parts that cannot be merged."""
    parser = command_parser(__doc__)
    parser.add_argument("parts", type=Path, nargs="+", help="prefixes, in order")
    parser.add_argument("--output-prefix", required=True, help="outputs, no extension")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    options = parser.parse_args(arguments)
    prefix = checked_prefix(options.output_prefix)
    documents = merge_corpora(options.parts, prefix, options.overwrite)
    print(f"{with_suffix(prefix, '.bin')}: {documents:,} documents")
    return 0
