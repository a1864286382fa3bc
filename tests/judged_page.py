"""Writes docs/arguments.md: what was found of each argument of Megatron's parser.

python -m tests.judged_page
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from megatron_tst.cpu.arguments import _WITHOUT_GPU
from megatron_tst.settings.judged_arguments import FILE, VERDICTS, Judgement, judgements

_COMMAND = "python -m tests.judged_page"
TARGET = Path(__file__).resolve().parents[1] / "docs" / "arguments.md"

_INTRODUCTION = """\
# Arguments of Megatron

Made by `make support-matrix` from `megatron_tst/settings/megatron_arguments.toml`; do not edit.
These are all arguments of the parser of Megatron-Core 0.19.2, by its groups.

{counts}

- **works**: a run with superposition has it in phase 1, in the test that is named.
- **same**: it is Megatron's alone in both phases, as without superposition; the file of Megatron
  that reads it is named. No test has it in phase 1.
- **refused**: with the reason, always or under the condition that is named; the message says what
  to do instead.
- **no effect**: training with `megatron_tst.pretrain` reads it nowhere.

`GPU` marks what the CPU platform refuses, because it needs a GPU: those were never run in phase 1.
"""


def main() -> None:
    """Writes the page, or with ``--check`` compares it."""
    if sys.argv[1:] != ["--check"]:
        write_file(TARGET, page())
    elif TARGET.read_text() != page():
        raise SystemExit(f"docs/{TARGET.name} is older than {FILE.name}: run `{_COMMAND}`.")


def page() -> str:
    """The page as the verdicts have it."""
    found = list(judgements())
    lines = [_INTRODUCTION.format(counts=_counts(found))]
    for group in dict.fromkeys(judgement.group for judgement in found):
        own = [judgement for judgement in found if judgement.group == group]
        lines += [f"## {group}\n", _counts(own), "", *_table(own), ""]
    return "\n".join(lines).rstrip() + "\n"


def _counts(found: list[Judgement]) -> str:
    counts = Counter[str]()
    for judgement in found:
        if not judgement.when:
            counts[judgement.verdict] += len(judgement.arguments)
    others = {flag for judgement in found if not judgement.when for flag in judgement.arguments}
    conditions = {flag for judgement in found if judgement.when for flag in judgement.arguments}
    counts["refused"] += len(conditions - others)
    listed = [f"{counts[verdict]} {_worded(verdict)}" for verdict in VERDICTS if counts[verdict]]
    text = f"{sum(counts.values())} arguments: {', '.join(listed)}"
    return (
        f"{text}; {len(conditions)} of them refused under a condition."
        if conditions
        else f"{text}."
    )


def _table(found: list[Judgement]) -> Iterator[str]:
    yield "| argument | verdict | |"
    yield "| --- | --- | --- |"
    for judgement in found:
        arguments = ", ".join(_marked(flag) for flag in judgement.arguments)
        yield f"| {arguments} | {_verdict(judgement)} | {_evidence(judgement)} |"


def _marked(flag: str) -> str:
    needs_gpu = any(other == flag and not value for _, other, value in _WITHOUT_GPU)
    return f"`{flag}` GPU" if needs_gpu else f"`{flag}`"


def _verdict(judgement: Judgement) -> str:
    text = _worded(judgement.verdict)
    return f"{text} {judgement.when}" if judgement.when else text


def _evidence(judgement: Judgement) -> str:
    text = judgement.evidence.replace("|", "\\|").replace("*", "\\*")
    if judgement.verdict == "works":
        file, _, test = judgement.evidence.partition(" as ")[0].partition("::")
        return f"[{test}](../{file})"
    return f"`{text}`" if judgement.verdict == "same" else text


def _worded(verdict: str) -> str:
    return verdict.replace("-", " ")


if __name__ == "__main__":
    main()
