"""What the checks before Megatron's own validation say about many command lines, in one process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron.training.arguments import add_megatron_arguments

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.training.command_line import add_arguments, check_arguments
from megatron_tst.training.exclusions import leave_out_documents
from megatron_tst.training.resume import check_resume


def main() -> int:
    """Reads a JSON list of command lines and writes the list of messages, null for none.

    Building Megatron's parser takes most of the time of a launch: all cases share one.
    """
    cases, messages = (Path(name) for name in sys.argv[1:])
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    found = [_message(parser.parse_args(argv)) for argv in json.loads(cases.read_text())]
    messages.write_text(json.dumps(found))
    return 0


def _message(args: argparse.Namespace) -> str | None:
    try:
        check_arguments(args)
        schedule = superposition_schedule_from_args(args)
        steps_done = check_resume(args, schedule)
        leave_out_documents(args, schedule.batch_sizes.samples_at(steps_done))
    except UsageError as error:
        return str(error)
    return None
