"""Tables of where a gain comes from. Gaps are paired by seed: positive where an arm is ahead."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tst.common.text_table import Table
from megatron_tst.common.units import DASH
from megatron_tst.report.origin_positions import by_offset, by_position
from megatron_tst.report.origin_recovery import recovery_of_arm
from megatron_tst.report.origin_seeds import Section, gap_cell, most_seeds, paired, recovery_cell
from megatron_tst.report.origin_settings import unequal_settings
from megatron_tst.report.origin_switch import losses_after_switch, moments, steps_around
from megatron_tst.report.origins import Arm


def sections(arms: Sequence[Arm]) -> list[Section]:
    """All tables that the measurements are enough for; the first arm is what others are held to."""
    of_ends = (settings_apart, final_losses, by_position, by_offset)
    made = (*of_ends, losses_after_switch, steps_around, moments)
    found = (make(arms) for make in made)
    return [section for section in found if section is not None and section.table.rows]


def markdown(arms: Sequence[Arm]) -> str:
    """The tables as a document."""
    parts = [f"## {title}\n\n{note}\n\n{table.markdown()}" for title, note, table in sections(arms)]
    return "\n".join(["# Where the gain comes from\n", *parts])


def settings_apart(arms: Sequence[Arm]) -> Section:
    """What arms have otherwise than the first one, superposition apart."""
    name = arms[0].name
    note = f"Outside of superposition. What an arm gains on {name} is due to this too."
    rows = [[arm, ", ".join(apart)] for arm, apart in unequal_settings(arms).items()]
    header = ["arm", f"differs from {name} in"]
    return Section("What the arms differ in", note, Table(header, rows))


def final_losses(arms: Sequence[Arm]) -> Section:
    """Validation losses at the end, held to the first arm and to the second, and the way there."""
    against, of = arms[: min(2, len(arms) - 1)], most_seeds(arms)
    rows = []
    for arm in arms:
        ends = [
            gap_cell(paired(arm, other, lambda t: t.final_loss), of) if other is not arm else DASH
            for other in against
        ]
        each = [run.final_loss for _, run in sorted(arm.runs.items())]
        listed = ", ".join(f"{loss:.4f}" for loss in each if loss is not None)
        back = recovery_cell(recovery_of_arm(arms[0], arm), of)
        rows.append([arm.name, listed or DASH, *ends, back])
    header = ["arm", "final loss, a seed each", *(f"ahead of {other.name}" for other in against)]
    header.append(f"steps from the switch until under {arms[0].name} to stay")
    note = (
        "Validation loss in nats a token. Between two validations an arm and the first one are "
        "taken to move on straight lines; where they are too far apart for that, the steps are "
        "those of the two. An arm that comes over the first one again was not under it to stay."
    )
    return Section("The end of training", note, Table(header, rows))
