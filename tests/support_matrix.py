"""Writes docs/support-matrix.md from the results of the tests.

    python -m pytest tests/integration --junitxml=results.xml
    python -m tests.support_matrix results.xml

``make support-matrix`` does both. Tests record what they cover as properties. The page ends with a
digest of the sources that it speaks of, and ``--check``, which runs no test, compares that.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from tests.integration.layouts import LAYOUTS, MODELS, UNTESTED

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "support-matrix.md"
# The definitions that say what is compared, resumed and refused, and whole files.
SOURCES: dict[str, tuple[str, ...]] = {
    "megatron_tst/settings/conflicts.py": (
        *("_OTHER_BATCHES", "_DOCUMENT_BOUNDARIES", "_DOCUMENT_MASKING"),
        *("_CONFLICTS", "_described", "_with_torch_fsdp2"),
    ),
    "tests/integration/layouts.py": (),
    "tests/integration/test_layouts.py": ("SWITCH", "TOLERANCES", "_FEW", "Case", "_cases"),
    "tests/integration/test_resharding.py": ("SWITCH", "STOPS", "ROUTES"),
    "tests/integration/test_bad_input.py": ("CONFLICTS",),
    "tests/support_matrix.py": ("_INTRODUCTION", "_DEVIATIONS", "_page"),
}
MEASURES = ("loss", "gradient norm", "gradients", "weights")
Properties = dict[str, str]

_INTRODUCTION = """\
# Support matrix

Made by `make support-matrix` from the results of the tests; do not edit. {origin}

Every run below is `megatron.training.pretrain` itself in as many processes as the layout has, on
CPU cores with gloo and Megatron's local modules, from the same weights as a run of one process and
on the same text. It starts in phase 1 and ends in phase 2. Nothing was run on a GPU.

DP, TP, SP, PP, CP, EP and ETP are data, tensor, sequence, pipeline, context, expert and expert
tensor parallelism; interleaved means virtual pipeline stages; overlapped is
`--overlap-moe-expert-parallel-comm`. Hybrid models are Megatron's `HybridModel` with the patterns
`*-` and `*E`.

[arguments.md](arguments.md) has a verdict on each of Megatron's arguments.
"""

_DEVIATIONS = """\
Relative to the run of one process, over all models and variants that are tested with the layout.
Losses and gradient norms: the worst step. Gradients (the first moments of Adam, which sum them up)
and weights (against the way that they have moved): the worst tensor at the end of the phase, by the
norm of the difference.
"""


def main() -> None:
    """Writes the page from the JUnit files named on the command line, or checks its age."""
    if sys.argv[1:] == ["--check"]:
        return _check()
    cases = [properties for name in sys.argv[1:] for properties in _read(Path(name))]
    if not cases:
        raise SystemExit("no test results: pass the --junitxml files of a run without failures")
    write_file(TARGET, "\n".join(_page(cases)) + "\n")


def _read(path: Path) -> Iterator[Properties]:
    """Properties of the tests that passed; none if a test failed."""
    root = ElementTree.parse(path).getroot()
    if any(suite.get("failures") != "0" or suite.get("errors") != "0" for suite in root):
        raise SystemExit(f"{path}: tests failed, so that they say nothing of what works")
    for case in root.iter("testcase"):
        found = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if "kind" in found and not _is_dropped(found):
            yield found


def _is_dropped(found: Properties) -> bool:
    """Whether the tests have no such case any more."""
    # Not above: it takes seconds, and a check needs none of it.
    from tests.integration.test_layouts import CASES, Case

    if found["kind"] != "deviation":
        return False
    return Case(*(found[name] for name in ("model", "layout", "dtype", "recipe"))) not in CASES


def _page(cases: list[Properties]) -> Iterator[str]:
    yield _INTRODUCTION.format(origin=_origin())
    yield "## Tested against one process\n"
    yield from _layout_table([case for case in cases if case.get("kind") == "deviation"])
    yield "\n## Worst deviation\n"
    yield _DEVIATIONS
    yield from _deviation_table([case for case in cases if case.get("kind") == "deviation"])
    yield "\n## Resumed at another layout\n"
    yield from _resume_table([case for case in cases if case.get("kind") == "resumed"])
    yield "\n## Refused\n"
    yield from _refusal_table([case for case in cases if case.get("kind") == "refused"])
    yield "\n## Untested\n"
    yield from (f"- {what}" for what in UNTESTED)
    yield f"\n{_digest_line()}"


def _check() -> None:
    if not TARGET.read_text().endswith(f"\n{_digest_line()}\n"):
        raise SystemExit(
            f"docs/{TARGET.name} is older than what it speaks of ({', '.join(SOURCES)}): "
            "run `make support-matrix`."
        )


def _digest_line() -> str:
    parts = (part for file, names in SOURCES.items() for part in _parts(ROOT / file, names))
    return f"<!-- Digest of the sources: {hashlib.sha256(repr([*parts]).encode()).hexdigest()} -->"


def _parts(file: Path, names: tuple[str, ...]) -> Iterator[str]:
    """The text of a file, or of its top-level definitions of these names."""
    text = file.read_text()
    if not names:
        yield text
        return
    found = {
        name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        for name in _defined(node)
    }
    yield from (found[name] for name in names)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def _origin() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"Commit {commit}, Python {platform.python_version()}, {os.cpu_count()} cores, seed 11."


def _layout_table(cases: list[Properties]) -> Iterator[str]:
    yield _row("layout", "processes", *MODELS)
    yield _row(*["---"] * (2 + len(MODELS)))
    for layout, settings in LAYOUTS.items():
        tested = {
            model: sorted(
                {
                    _what(case)
                    for case in cases
                    if (case["layout"], case["model"]) == (layout, model)
                }
            )
            for model in MODELS
        }
        if any(tested.values()):
            cells = [", ".join(tested[m]) or _without_tests(m, layout) for m in MODELS]
            yield _row(layout, str(settings.processes), *cells)


def _without_tests(model: str, layout: str) -> str:
    if "MTP" in model and "context_parallel_size" in LAYOUTS[layout].arguments:
        return "refused"
    needs_experts = "expert_model_parallel_size" in LAYOUTS[layout].arguments
    return "no experts" if needs_experts and "num_experts" not in MODELS[model] else "untested"


def _what(case: Properties) -> str:
    return case["dtype"] if case["recipe"] == "full" else case["recipe"]


def _deviation_table(cases: list[Properties]) -> Iterator[str]:
    yield _row("layout", "dtype", "phase", *MEASURES)
    yield _row(*["---"] * (3 + len(MEASURES)))
    for layout in LAYOUTS:
        for dtype in ("fp32", "bf16"):
            found = [c for c in cases if (c["layout"], c["dtype"]) == (layout, dtype)]
            for phase in ("phase 1", "phase 2") if found else ():
                worst = [max(float(c[f"{phase}, {m}"]) for c in found) for m in MEASURES]
                yield _row(layout, dtype, phase[-1], *(f"{value:.0e}" for value in worst))


def _resume_table(cases: list[Properties]) -> Iterator[str]:
    columns = ("model", "saved at", "stopped in", "resumed at")
    yield _row(*columns)
    yield _row(*["---"] * len(columns))
    for case in cases:
        yield _row(*(case[column] for column in columns))


def _refusal_table(cases: list[Properties]) -> Iterator[str]:
    yield _row("setting", "message")
    yield _row("---", "---")
    for case in cases:
        for flag, message in case.items():
            if flag.startswith("--"):
                yield _row(f"`{flag}`", message)


def _row(*cells: str) -> str:
    return f"| {' | '.join(_escaped(cells))} |"


def _escaped(cells: Iterable[str]) -> Iterator[str]:
    return (cell.replace("|", "\\|") for cell in cells)


if __name__ == "__main__":
    main()
