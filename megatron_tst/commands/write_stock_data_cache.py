"""Writes the data cache with which plain Megatron reads on where a run with superposition was."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an iter_... folder, or a --save folder")
    add("--data-cache-path", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    # Of Megatron, on what is not installed and what it does.
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)

    from megatron_tst import cpu

    cpu.activate()
    from megatron_tst.settings.phases import bags_name
    from megatron_tst.training.stock_data import write_stock_data

    written = write_stock_data(options.checkpoint, options.data_cache_path)
    print(
        f"{written.checkpoint}: {written.samples_read:,} of {written.samples:,} samples are read. "
        f"Pass plain Megatron the arguments of the run without --tst-*, and\n"
        f"  --load {written.checkpoint.parent} --ckpt-step {written.step} "
        f"--data-cache-path {written.cache}"
    )
    schedule = written.schedule
    if schedule.phase_at(written.step).is_superposed:
        print(
            f"warning: {bags_name(schedule.phases)} was to last {schedule.switch_step} steps and "
            f"ends after {written.step}; the rest of its tokens is read in plain samples first.",
            file=sys.stderr,
        )
    return 0
