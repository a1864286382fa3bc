"""Tables of where a gain comes from. Gaps are paired by seed: positive where an arm is ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_tst.common.text_table import Table
from megatron_tst.common.units import DASH, MINUS
from megatron_tst.report.curves import first_reached
from megatron_tst.report.origin_settings import unequal_settings
from megatron_tst.report.origins import (
    CHECKPOINTS_AFTER,
    GRADIENT,
    MOMENT,
    POSITION,
    POSITION_TOKENS,
    STEPS_AFTER,
    TEXT,
    TRAINING,
    VALIDATION,
    Arm,
    Trace,
)
from megatron_tst.report.statistics import Estimate, estimate
from megatron_tst.report.units import gap_text, loss_text

_WINDOWS = ((-50, 0), (0, 5), (5, 20), (20, 50), (50, 100), (100, STEPS_AFTER))
"""Of steps after the switch, the first one left out."""


class Section(NamedTuple):
    """A table with what it says.

    Attributes:
        title: heading.
        note: what the numbers are.
        table: of them.
    """

    title: str
    note: str
    table: Table


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


def paired(one: Arm, other: Arm, value: Callable[[Trace], float | None]) -> Estimate | None:
    """Mean over seeds of ``other``'s value minus that of ``one``; None without a pair."""
    pairs = [
        (value(other.runs[seed]), value(run))
        for seed, run in one.runs.items()
        if seed in other.runs
    ]
    found = [theirs - ours for theirs, ours in pairs if theirs is not None and ours is not None]
    return estimate(found) if found else None


def mean(arm: Arm, value: Callable[[Trace], float | None]) -> Estimate | None:
    """Mean over the seeds that have a value."""
    found = [v for v in map(value, arm.runs.values()) if v is not None]
    return estimate(found) if found else None


def last_switch(arms: Sequence[Arm]) -> int | None:
    """The step after which the first arm with bags has none."""
    return next((trace.switch_step for trace in _firsts(arms) if trace.switch_step), None)


def settings_apart(arms: Sequence[Arm]) -> Section:
    """What arms have otherwise than the first one, superposition apart."""
    name = arms[0].name
    note = f"Outside of superposition. What an arm gains on {name} is due to this too."
    rows = [[arm, ", ".join(apart)] for arm, apart in unequal_settings(arms).items()]
    header = ["arm", f"differs from {name} in"]
    return Section("What the arms differ in", note, Table(header, rows))


def final_losses(arms: Sequence[Arm]) -> Section:
    """Validation losses at the end, held to the first arm and to the second, and the way there."""
    against, of = arms[: min(2, len(arms) - 1)], _most_seeds(arms)
    rows = []
    for arm in arms:
        ends = [
            _gap(paired(arm, other, lambda t: t.final_loss), of) if other is not arm else DASH
            for other in against
        ]
        each = [run.final_loss for _, run in sorted(arm.runs.items())]
        listed = ", ".join(f"{loss:.4f}" for loss in each if loss is not None)
        level = crossing(arms[0], arm)
        rows.append([arm.name, listed or DASH, *ends, DASH if level is None else _steps(level, of)])
    header = ["arm", "final loss, a seed each", *(f"ahead of {other.name}" for other in against)]
    header.append(f"steps from the switch until level with {arms[0].name}")
    note = (
        "Validation loss in nats a token. Between two validations an arm and the first one are "
        "taken to move on straight lines."
    )
    return Section("The end of training", note, Table(header, rows))


def by_position(arms: Sequence[Arm]) -> Section | None:
    """Gaps by how many tokens a prediction sees, in powers of two."""
    length = _length(arms)
    if not length:
        return None
    bins = position_bins(length, 1)
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in bins]
    masks = [np.isin(np.arange(1, length + 1), range(low, high + 1)) for low, high in bins]
    note = "Loss on the text at the last step, by the number of tokens that a prediction sees."
    return Section("By position", note, _of_positions(arms, "tokens seen", names, masks))


def position_bins(length: int, per_octave: int) -> list[tuple[int, int]]:
    """First and last position of bins that grow with the position."""
    powers = (round(2 ** (k / per_octave)) for k in range(length.bit_length() * per_octave))
    ends = sorted({length, *(end for end in powers if end < length)})
    return [(low + 1, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]


def by_offset(arms: Sequence[Arm]) -> Section | None:
    """Gaps by the place in the bag that a predicted token would have had."""
    length, size = _length(arms), max(trace.bag_size for trace in _firsts(arms))
    if not length or size < 2:
        return None
    # A prediction that sees n tokens is of the token n + 1, which counted from 1 is n % size + 1.
    seen = np.arange(1, length + 1)
    masks = [seen % size == offset for offset in range(size)]
    names = [f"{offset + 1} of {size}" for offset in range(size)]
    note = (
        f"The same by the place that the predicted token would have in bags of {size} which begin "
        "with the sequence."
    )
    return Section("By offset", note, _of_positions(arms, "place in the bag", names, masks))


def position_losses(trace: Trace) -> tuple[np.ndarray, np.ndarray] | None:
    """Losses and tokens by position at the last step, [n] each; None where they lack."""
    losses = trace.places(POSITION, trace.total_steps)
    if not losses:
        return None
    tokens = trace.places(POSITION_TOKENS, trace.total_steps)
    places = sorted(losses, key=int)
    return np.array([losses[p] for p in places]), np.array([tokens[p] for p in places])


def _length(arms: Sequence[Arm]) -> int:
    found = (position_losses(trace) for arm in arms for trace in arm.runs.values())
    return max((len(each[0]) for each in found if each is not None), default=0)


def _of_positions(
    arms: Sequence[Arm], head: str, names: Sequence[str], masks: Sequence[np.ndarray]
) -> Table:
    baseline, others = arms[0], arms[1:]

    def loss_in(mask: np.ndarray) -> Callable[[Trace], float | None]:
        def loss(trace: Trace) -> float | None:
            found = position_losses(trace)
            return None if found is None else float(np.average(found[0], weights=found[1] * mask))

        return loss

    whole, of = np.ones(len(masks[0]), dtype=bool), _most_seeds(arms)
    rows = [
        [
            name,
            _loss(mean(baseline, loss_in(mask)), of),
            *(_gap(paired(arm, baseline, loss_in(mask)), of, 4) for arm in others),
        ]
        for name, mask in [*zip(names, masks, strict=True), ("all", whole)]
    ]
    header = [head, f"loss of {baseline.name}", *(f"{arm.name} ahead by" for arm in others)]
    return Table(header, rows)


def losses_after_switch(arms: Sequence[Arm]) -> Section | None:
    """Loss on the text at checkpoints from the switch on."""
    switch, baseline, of = last_switch(arms), arms[0], _most_seeds(arms)
    if switch is None:
        return None
    shared = {arm.name: _shared_steps(baseline, arm, switch) for arm in arms[1:]}
    shown = [arm for arm in arms[1:] if len(shared[arm.name]) > 1]
    rows = []
    for step in sorted(set().union(*(shared[arm.name] for arm in shown))):
        at = _text_loss_at(step)
        gaps = [
            cell
            for arm in shown
            for cell in (_loss(mean(arm, at), of), _gap(paired(arm, baseline, at), of))
        ]
        rows.append([f"{step - switch}", _loss(mean(baseline, at), of), *gaps])
    header = ["steps after the switch", f"loss of {baseline.name}"]
    header += [cell for arm in shown for cell in (f"loss of {arm.name}", f"{arm.name} ahead by")]
    note = "Loss on the text as plain text, of checkpoints."
    return Section("After the switch", note, Table(header, rows))


def crossing(baseline: Arm, arm: Arm) -> Estimate | None:
    """Steps after the switch until the validation loss is that of the baseline, over seeds."""
    found = []
    for seed, run in arm.runs.items():
        if seed not in baseline.runs or run.switch_step is None:
            continue
        ours, theirs = (r.series(VALIDATION) for r in (run, baseline.runs[seed]))
        steps = [step for step in ours if step >= run.switch_step and step in theirs]
        behind = np.array([ours[step] - theirs[step] for step in steps])
        if steps and (at := first_reached(np.array(steps, dtype=float), behind, 0.0)) is not None:
            found.append(at - run.switch_step)
    return estimate(found) if found else None


def _text_loss_at(step: int) -> Callable[[Trace], float | None]:
    return lambda trace: trace.series(TEXT).get(step)


def _shared_steps(one: Arm, other: Arm, since: int) -> set[int]:
    found = [set(run.series(TEXT)) for arm in (one, other) for run in arm.runs.values()]
    return {step for step in set.intersection(*found) if 0 <= step - since <= CHECKPOINTS_AFTER}


def steps_around(arms: Sequence[Arm]) -> Section | None:
    """Gradient norms and training losses of single steps around the switch."""
    switch = last_switch(arms)
    if switch is None:
        return None
    shown = [arm for arm in arms if all(_is_logged(run, switch) for run in arm.runs.values())]
    if len(shown) < 2:
        return None
    rows, of = [], _most_seeds(arms)
    for low, high in _WINDOWS:
        means = [
            _loss(mean(arm, _window_mean(quantity, switch + low, switch + high)), of, 3)
            for quantity in (GRADIENT, TRAINING)
            for arm in shown
        ]
        rows.append([f"{low + 1} to {high}".replace("-", MINUS), *means])
    header = ["steps after the switch"]
    header += [f"{quantity}, {arm.name}" for quantity in (GRADIENT, TRAINING) for arm in shown]
    note = (
        "Means over steps. The training loss before the switch is that of bags in arms with bags."
    )
    return Section("Around the switch", note, Table(header, rows))


def _is_logged(run: Trace, switch: int) -> bool:
    series = run.series(GRADIENT)
    last = min(STEPS_AFTER, run.total_steps - switch)
    return all(switch + step in series for step in range(1, last + 1))


def _window_mean(quantity: str, after: int, until: int) -> Callable[[Trace], float | None]:
    def value(trace: Trace) -> float | None:
        found = [v for step, v in trace.series(quantity).items() if after < step <= until]
        return float(np.mean(found)) if found else None

    return value


def moments(arms: Sequence[Arm]) -> Section | None:
    """Second moments after the switch over those of the last checkpoint that was looked at."""
    switch = last_switch(arms)
    if switch is None:
        return None
    shown = [arm for arm in arms if len(_moment_steps(arm, switch)) > 1]
    if not shown:
        return None
    steps = sorted(set.intersection(*(_moment_steps(arm, switch) for arm in shown)))
    if len(steps) < 2:
        return None
    rows = list(_moment_rows(shown, steps))
    header = ["arm", "tensor", *(f"{step - switch}" for step in steps[:-1])]
    note = (
        f"Mean of Adam's second moments over a tensor, by steps after the switch, over its value "
        f"{steps[-1] - switch} steps after it; geometric mean over seeds."
    )
    return Section("Adam's second moments", note, Table(header, rows))


def _moment_steps(arm: Arm, switch: int) -> set[int]:
    found = [
        {s for q, s, _ in run.values if q == MOMENT and s >= switch} for run in arm.runs.values()
    ]
    # The end has another learning rate.
    ends = {run.total_steps for run in arm.runs.values()}
    return set.intersection(*found) - ends if found else set()


def _moment_rows(arms: Sequence[Arm], steps: Sequence[int]) -> Iterator[list[str]]:
    for arm in arms:
        first = next(iter(arm.runs.values()))
        for name in first.places(MOMENT, steps[0]):
            yield [
                arm.name,
                name,
                *(f"{moment_ratio(arm, name, step, steps[-1]):.2f}" for step in steps[:-1]),
            ]


def moment_ratio(arm: Arm, tensor: str, step: int, last: int) -> float:
    """Geometric mean over seeds of a second moment at a step over that at another."""
    values = [(run.places(MOMENT, step), run.places(MOMENT, last)) for run in arm.runs.values()]
    return float(np.exp(np.mean([np.log(a[tensor] / b[tensor]) for a, b in values])))


def _firsts(arms: Sequence[Arm]) -> list[Trace]:
    return [next(iter(arm.runs.values())) for arm in arms]


def _most_seeds(arms: Sequence[Arm]) -> int:
    return max(len(arm.runs) for arm in arms)


def _gap(found: Estimate | None, of: int, digits: int = 3) -> str:
    return DASH if found is None else gap_text(found, digits) + _some(found, of)


def _loss(found: Estimate | None, of: int, digits: int = 4) -> str:
    if found is None:
        return DASH
    return loss_text(Estimate(found.mean, None, None, None, 1), digits) + _some(found, of)


def _steps(found: Estimate, of: int) -> str:
    return loss_text(found, 0) + _some(found, of)


def _some(found: Estimate, of: int) -> str:
    """Says where a seed lacks a run or a value."""
    return f" (n = {found.n} of {of})" if found.n < of else ""
