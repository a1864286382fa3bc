"""Where a gain comes from: what some arms of runs measured, as one table on file.

A row is one number of one run. An arm is a setting, its runs differ in their seed alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import argument_of
from megatron_tst.report.checked_settings import shown, whole_number
from megatron_tst.report.describing import DATA_KEYS, MODEL_SETTINGS, NUMERICS, Setting
from megatron_tst.report.tables import Row, read_table, write_table

VALIDATION, TRAINING, GRADIENT = "validation loss", "training loss", "gradient norm"
TEXT, POSITION, POSITION_TOKENS = "text loss", "loss of position", "tokens of position"
MOMENT = "second moment"
STEPS_BEFORE, STEPS_AFTER = 50, 200
"""Around a switch, what is logged of each step is kept."""
CHECKPOINTS_AFTER = 1000
"""Checkpoints are measured from a switch to so many steps after it, and at the end."""

_RUN = "run"
_COLUMNS = ("arm", "seed", "quantity", "step", "place", "value")
_OF_RUN = ("total_steps", "switch_step", "bag_size", "text", "machine", "commit")
_SETTINGS = "settings"
_TEXT_COLUMNS = ("arm", "quantity", "place", "text", "machine", "commit", _SETTINGS)

Key = tuple[str, int, str]
"""Quantity, optimizer step, and place: a position of the sequence from 1, or a tensor."""


@dataclass(frozen=True)
class Trace:
    """What was measured of one run.

    Attributes:
        arm: the setting, as the user calls it.
        seed: of the run.
        total_steps: of the whole run.
        switch_step: the last step with bags, None without superposition.
        bag_size: the largest of the run.
        text: SHA-256 of the text whose loss by position was measured, if it was.
        machine: where it trained.
        commit: of this project.
        values: in nats a token, or as Megatron logs it; of second moments the mean over a tensor.
        settings: all but the seed that can matter and is not off; empty where not recorded.
    """

    arm: str
    seed: int
    total_steps: int
    switch_step: int | None
    bag_size: int
    text: str | None
    machine: str
    commit: str
    values: dict[Key, float] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)

    def series(self, quantity: str, place: str = "") -> dict[int, float]:
        """Values by step, ascending."""
        found = {step: v for (q, step, p), v in self.values.items() if (q, p) == (quantity, place)}
        return dict(sorted(found.items()))

    def places(self, quantity: str, step: int) -> dict[str, float]:
        """Values by place, in their order."""
        return {p: v for (q, s, p), v in self.values.items() if (q, s) == (quantity, step)}

    @property
    def final_loss(self) -> float | None:
        """Validation loss at the last step; None where the run was not trained to its end."""
        return self.series(VALIDATION).get(self.total_steps)


@dataclass(frozen=True)
class Arm:
    """Runs of one setting.

    Attributes:
        name: as the user calls it.
        runs: by seed.
    """

    name: str
    runs: dict[int, Trace]


def arms_of(traces: Iterable[Trace]) -> list[Arm]:
    """Arms in the order of their first runs.

    Raises:
        UsageError: an arm has a seed twice, or as :func:`check_comparable`.
    """
    traces = list(traces)
    check_comparable(traces)
    arms: dict[str, Arm] = {}
    for trace in traces:
        arm = arms.setdefault(trace.arm, Arm(trace.arm, {}))
        if trace.seed in arm.runs:
            raise UsageError(f"--arm {arm.name} has two runs of seed {trace.seed}: leave one out.")
        arm.runs[trace.seed] = trace
    return list(arms.values())


def check_comparable(traces: Sequence[Trace]) -> None:
    """Refuses runs whose numbers cannot be set against each other.

    Args:
        traces: of all arms; measured or not, and several of a seed.

    Raises:
        UsageError: runs of an arm differ in more than their seed, arms in their model or data, or
            losses are of two texts.
    """
    firsts: dict[str, Trace] = {}
    for trace in traces:
        _check_arm(firsts.setdefault(trace.arm, trace), trace)
        _check_data(traces[0], trace)
    texts = {trace.text: trace.arm for trace in traces if trace.text}
    if len(texts) > 1:
        found = " and ".join(f"{text[:12]}... (--arm {arm})" for text, arm in texts.items())
        raise UsageError(
            f"losses by position are of several texts, with SHA-256 {found}: measure all arms on "
            "one --text."
        )


def _check_arm(first: Trace, trace: Trace) -> None:
    for name in ("switch_step", "total_steps", "bag_size"):
        was, value = getattr(first, name), getattr(trace, name)
        if was != value:
            raise UsageError(
                f"--arm {trace.arm}: its runs have {name.replace('_', ' ')} {was} and {value}: "
                "pass runs that differ in their seed alone as one arm."
            )
    if apart := differences(first, trace):
        raise UsageError(
            f"--arm {trace.arm}: its runs differ in {', '.join(apart.values())}: pass runs that "
            "differ in their seed alone as one arm."
        )


def _check_data(first: Trace, trace: Trace) -> None:
    found = differences(first, trace)
    apart = [text for name, text in found.items() if name in (*DATA_KEYS, *MODEL_SETTINGS)]
    if apart:
        raise UsageError(
            f"--arm {first.arm} and --arm {trace.arm} cannot be compared: their runs differ in "
            f"{', '.join(apart)}. Pass runs of one model, one tokenizer and one validation set."
        )


def differences(one: Trace, other: Trace) -> dict[str, str]:
    """By setting, how two runs differ; of runs that did not record theirs only in their length."""
    first, second = ({"total_steps": run.total_steps, **run.settings} for run in (one, other))
    names = dict.fromkeys((*first, *second))
    if not (one.settings and other.settings):
        names = {"total_steps": None}
    pairs = {
        name: (argument_of(first, name), argument_of(second, name))
        for name in names
        # What of the numerics is not recorded keeps nothing apart.
        if name not in NUMERICS or (name in first and name in second)
    }
    return {name: f"{name} ({was}, not {is_})" for name, (was, is_) in pairs.items() if was != is_}


def write_traces(traces: Sequence[Trace], path: Path) -> None:
    """Writes a table, CSV or Parquet by the suffix."""
    rows = [row for trace in traces for row in _rows(trace)]
    recorded = (_SETTINGS,) if any(trace.settings for trace in traces) else ()
    write_table(path, rows, (*_COLUMNS, *_OF_RUN, *recorded))


def _rows(trace: Trace) -> Iterable[Row]:
    of_run = {name: getattr(trace, name) for name in _OF_RUN}
    lead = {"arm": trace.arm, "seed": trace.seed}
    if trace.settings:
        of_run[_SETTINGS] = json.dumps(trace.settings, separators=(",", ":"))
    yield {**lead, "quantity": _RUN, **{n: v for n, v in of_run.items() if v is not None}}
    for (quantity, step, place), value in trace.values.items():
        rounded = float(f"{value:.10g}")
        yield {**lead, "quantity": quantity, "step": step, "place": place, "value": rounded}


def read_traces(path: Path) -> list[Trace]:
    """Reads what :func:`write_traces` wrote.

    Raises:
        UsageError: naming the file and what is wrong with it.
    """
    rows = read_table(path, (*_COLUMNS, *_OF_RUN), _TEXT_COLUMNS)
    found: dict[tuple[str, int], Trace] = {}
    for row in (row for row in rows if row["quantity"] == _RUN):
        key, where = _key(row, path)
        if key in found:
            raise UsageError(f"{where}: its run row is there twice: keep one.")
        for name in ("total_steps", "switch_step", "bag_size"):
            if row[name] is not None or name != "switch_step":
                row[name] = whole_number(name, row[name], where, 1)
        of_run = {name: row[name] for name in _OF_RUN}
        found[key] = Trace(*key, **of_run, settings=_settings(path, row))
    for row in (row for row in rows if row["quantity"] != _RUN):
        key, where = _key(row, path)
        if key not in found:
            raise UsageError(f"{path} has values of a run {key[0]}, seed {key[1]}, and no run row.")
        step = whole_number("step", row["step"], where, 0)
        # Positions, which a program that read the table may have written as 7.0.
        place = (row["quantity"], step, re.sub(r"^(\d+)\.0$", r"\1", row["place"] or ""))
        if place in found[key].values:
            raise UsageError(
                f"{where}: {row['quantity']} of step {step} {place[2]} is there twice: keep one."
            )
        found[key].values[place] = _number(row["value"], where)
    if not found:
        raise UsageError(f"{path} holds no runs.")
    return list(found.values())


def _key(row: Row, path: Path) -> tuple[tuple[str, int], str]:
    """Arm and seed, and how errors name the run."""
    seed = whole_number("seed", row["seed"], f"{path}: arm {row['arm']}")
    return (row["arm"], seed), f"{path}: arm {row['arm']}, seed {seed}"


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UsageError(f"{where}: value is {shown(value)}: write a number.")
    return float(value)


def _settings(path: Path, row: Row) -> dict[str, Setting]:
    """Those of a run; none in a table of an earlier version."""
    try:
        found = json.loads(row.get(_SETTINGS) or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"{path}: the {_SETTINGS} of {row['arm']}, seed {row['seed']}, are no JSON object: "
            "write the table again."
        )
    return found
