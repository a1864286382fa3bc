"""What arms differ in besides superposition, and which of them do not tell."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tst.report.compared_settings import SUPERPOSITION_SETTINGS
from megatron_tst.report.origins import Arm, differences


def unequal_settings(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """By arm, the settings outside of superposition that the first arm has otherwise.

    Arms that have none are left out.
    """
    first, *others = (next(iter(arm.runs.values())) for arm in arms)
    found = {}
    for other in others:
        apart = differences(other, first)
        named = [text for name, text in apart.items() if name not in SUPERPOSITION_SETTINGS]
        if named:
            found[other.arm] = named
    return found


def unrecorded(arms: Sequence[Arm]) -> str:
    """Which runs do not tell their settings, as a sentence; empty if all do."""
    runs = [run for arm in arms for run in arm.runs.values()]
    silent = [run for run in runs if not run.settings]
    if not silent:
        return ""
    return (
        f"{len(silent)} of {len(runs)} runs did not record their settings: that the arms have one "
        "model, corpus, batch size and learning rate was not checked."
    )
