"""Checks many launches in one process, whose imports take most of the time."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path


def main() -> int:
    """Reads a JSON list of launches and writes the list of their reports."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_tst import cpu

    cpu.activate()
    from megatron_tst.planning import posing
    from megatron_tst.planning.preflight import Launch, check_launch
    from megatron_tst.planning.preflight_wording import finding_lines, report_as_json, summary_lines

    posing.pose((10, 0))
    parser = posing.launch_parser()
    found = []
    cases, results = (Path(name) for name in sys.argv[1:])
    for case in json.loads(cases.read_text()):
        begin = time.perf_counter()
        launch = Launch(**case)
        report = check_launch(parser, launch)
        found.append(
            report_as_json(report, launch.gpu_bytes)
            | {"lines": summary_lines(report) + finding_lines(report)}
            | {"seconds": time.perf_counter() - begin}
        )
    results.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
