"""Says what a verification of a checkpoint found."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tst.checkpoint.findings import CHECKS, FILES, Fault, Verification
from megatron_tst.common.text_table import Table

_MOST_FAULTS = 20


def description(result: Verification) -> str:
    """Tables of what was looked at and what is wrong, and what to do."""
    return "\n".join(_parts(result))


def _parts(result: Verification) -> Iterator[str]:
    size = result.bytes / 1e6
    yield f"{result.checkpoint}: {result.summary}; {size:,.1f} MB of tensors\n"
    yield _checks(result).markdown()
    if result.faults:
        yield _faults(result.faults).markdown()
    if len(result.faults) > _MOST_FAULTS:
        yield f"... and {len(result.faults) - _MOST_FAULTS} more\n"
    for note in result.notes:
        yield f"Note: {note}."
    yield "FAULTS FOUND." if result.faults else "No fault found."
    if result.remedy:
        yield result.remedy
    yield ""


def _checks(result: Verification) -> Table:
    def row(check: str) -> tuple[str, str, str]:
        faults = [fault for fault in result.faults if fault.check == check]
        return check, f"{result.looked_at[check]:,}", f"{sum(f.count for f in faults):,}"

    rows = [row(check) for check in CHECKS]
    return Table(("what", "looked at", "wrong"), [row for row in rows if row[1:] != ("0", "0")])


def _faults(faults: list[Fault]) -> Table:
    # Files explain what comes after them.
    worst = sorted(faults, key=lambda fault: (fault.check != FILES, -fault.count))[:_MOST_FAULTS]
    rows = [(fault.where, fault.text, f"{fault.count:,}", f"{fault.share:.1%}") for fault in worst]
    return Table(("where", "what is wrong", "how many", "share"), rows)
