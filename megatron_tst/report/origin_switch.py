"""What the switch costs: losses, gradients and second moments around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_tst.common.text_table import Table
from megatron_tst.common.units import MINUS
from megatron_tst.report.origin_seeds import (
    Section,
    gap_cell,
    last_switch,
    loss_cell,
    mean,
    most_seeds,
    paired,
)
from megatron_tst.report.origins import (
    CHECKPOINTS_AFTER,
    GRADIENT,
    MOMENT,
    STEPS_AFTER,
    TEXT,
    TRAINING,
    Arm,
    Trace,
)

_WINDOWS = ((-50, 0), (0, 5), (5, 20), (20, 50), (50, 100), (100, STEPS_AFTER))
"""Of steps after the switch, the first one left out."""


def losses_after_switch(arms: Sequence[Arm]) -> Section | None:
    """Loss on the text at checkpoints from the switch on."""
    switch, baseline, of = last_switch(arms), arms[0], most_seeds(arms)
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
            for cell in (loss_cell(mean(arm, at), of), gap_cell(paired(arm, baseline, at), of))
        ]
        rows.append([f"{step - switch}", loss_cell(mean(baseline, at), of), *gaps])
    header = ["steps after the switch", f"loss of {baseline.name}"]
    header += [cell for arm in shown for cell in (f"loss of {arm.name}", f"{arm.name} ahead by")]
    note = "Loss on the text as plain text, of checkpoints."
    return Section("After the switch", note, Table(header, rows))


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
    rows, of = [], most_seeds(arms)
    for low, high in _WINDOWS:
        means = [
            loss_cell(mean(arm, _window_mean(quantity, switch + low, switch + high)), of, 3)
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
