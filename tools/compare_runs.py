"""Compares a baseline run and a TST run: writes one self-contained HTML page, and its plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tst.report.comparison import compare
from megatron_tst.report.html import write_report
from megatron_tst.report.runs import read_run
from megatron_tst.report.wording import verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--baseline", type=Path, required=True, help="run folder of the baseline")
    add("--tst", type=Path, required=True, help="run folder of the TST run")
    add("--output", type=Path, required=True, help="HTML file to write")
    add("--sample", type=Path, help="text file with a sample that the trained model generated")
    args = parser.parse_args(arguments)
    try:
        sample = None if args.sample is None else args.sample.read_text(encoding="utf-8")
        comparison = compare(read_run(args.baseline), read_run(args.tst))
        files = write_report(comparison, args.output, sample)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*verdict(comparison), "", *map(str, files)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
