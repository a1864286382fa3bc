"""Checks many launches in one process, whose imports take most of the time."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> int:
    """Reads launches and measurements as JSON, and writes what became of them in their order."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_tst import cpu
    from megatron_tst.preflight.engine_path import make_engine_importable

    cases, results = (Path(name) for name in sys.argv[1:])
    asked = json.loads(cases.read_text())
    if asked["with_engine"]:
        make_engine_importable()
    cpu.activate()
    from megatron_tst.preflight import rank_simulation

    rank_simulation.assume_machine((10, 0))
    parser = rank_simulation.launch_parser()
    found = {
        "launches": [_checked(parser, case) for case in asked["launches"]],
        "measured": [_measured(*case) for case in asked["measured"]],
    }
    results.write_text(json.dumps(found))
    return 0


def _checked(parser: argparse.ArgumentParser, case: dict[str, Any]) -> dict[str, Any]:
    from megatron_tst.preflight.checks import Launch, check_launch
    from megatron_tst.preflight.wording import finding_lines, report_as_json, summary_lines

    begin = time.perf_counter()
    launch = Launch(**case)
    report = check_launch(parser, launch)
    return report_as_json(report, launch.gpu_bytes) | {
        "lines": summary_lines(report) + finding_lines(report),
        "seconds": time.perf_counter() - begin,
    }


def _measured(function: str, arguments: list[Any]) -> Any:
    module, _, name = function.partition(".")
    return getattr(import_module(f"tests.{module}"), name)(*arguments)


if __name__ == "__main__":
    sys.exit(main())
