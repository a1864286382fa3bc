"""Keeps the figures and verdicts of docs/results.md those of the committed tables.

A figure or verdict of the page stands before a comment that says what it is, as in
``+0.021 ± 0.019<!--gap 127k: s=2 r=0.3-->``. ``python -m tests.results_page`` writes each anew, and
a test compares. A comment is a kind, a section and a setting as the tables name it:

- ``gap``: to the baseline at equal FLOPs; ``data``: at equal data, from finished runs;
- ``diff`` of ``A vs B``: final loss of B minus that of A, seed by seed;
- ``more`` of ``A vs SECTION: B``: the gap of A minus that of B, of another text or size, so that
  no seed pairs with one (Welch's interval);
- ``total``, ``decay``, ``bags``, ``share`` of ``A on B``: what A gains on the longer baseline B;
  ``beyond``: the part of the decay minus that of the bags;
- ``speed``: steps that a baseline needs to end as low; ``steps``: those beyond TST's;
- ``ends``: final losses, seed by seed; ``back``: steps from the switch until the run is under the
  baseline to stay, or between which where it was evaluated too seldom, and in how many seeds;
  ``phase 1``: mean training loss from step 500 to the switch; ``seeds``;
- ``under 4.4``: step of the first evaluation with a loss under this one, seed by seed, "never"
  where there is none;
- ``is`` and one of those above that are gaps: its state; ``verdict CLAIM``: see :func:`verdict`,
  over several gaps, or a ``back``, with ``;`` between them;
- ``must`` a state and gaps, ``must most`` and ``A on B``, where the decay has more of the gain
  than the bags, ``must wider`` and ``A vs B``: what words of the page say; nothing is written
  where it is so, and "not so" where not;
- ``theirs``: a figure of somebody else, left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from math import nan, sqrt
from pathlib import Path

import numpy as np

from megatron_tst.common.units import MINUS, PLUS_MINUS, TIMES
from megatron_tst.report.comparison import Study, study_of
from megatron_tst.report.decomposition import Gain, gains_of
from megatron_tst.report.families import Group, families_of, with_differing_arguments
from megatron_tst.report.matchup import Length, Matchup
from megatron_tst.report.plots import captions
from megatron_tst.report.recovery import recovery_of
from megatron_tst.report.results_table import read_results
from megatron_tst.report.statistics import FEWEST_SEEDS, Estimate, estimate, is_decided, t_quantile
from megatron_tst.report.units import gap_text, ratio_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
CHOOSING = ROOT / "docs/choosing-s-and-r.md"
"""Quotes some of its figures."""
TABLES = ROOT / "docs/results"
SECTIONS = {
    "127k": ("proxy", 127_296),
    "443k": ("proxy", 443_008),
    "experts": ("proxy", 189_248),
    "long": ("long", 127_296),
    "long 443k": ("long", 443_008),
    "subwords": ("subwords", 1_090_432),
}
"""Table and size of the model of each section that comments name."""

NOT_RUN, NOT_SO = "not run", "not so"
STATES = ("ahead", "behind", "undecided", "too few seeds", NOT_RUN)
VERDICTS = ("reproduced in part", "reproduced", "contradicted", "mixed", "undecided", "not tested")

_N = r"(?: \(n = \d\))?"
_GAP = rf"[+{MINUS}]\d\.\d{{3}}(?: {PLUS_MINUS} \d\.\d{{3}})?{_N}"
_RATIO = rf"\d\.\d\d{TIMES}(?: \(\d\.\d\d to \d\.\d\d\))?{_N}"
_BOUND = rf"(?:more|less) than [\d.]+{TIMES} in \d of \d seeds"
_LOSSES = r"\d\.\d{3}(?:, \d\.\d{3})*(?: and \d\.\d{3})?"
_WORDS = "|".join([*STATES, *VERDICTS, NOT_SO])
_STEPS = r"\d+(?: to \d+)?(?: in \d of \d)?"
_STEP = r"(?:\d+|never)"
_STEPS_BY_SEED = rf"{_STEP}(?:, {_STEP})*(?: and {_STEP})?"
_VALUE = (
    rf"{_GAP}|{_RATIO}|{_BOUND}(?: and {_BOUND})*|{_LOSSES}|\d+%{_N}|\d\.\d\d|{_STEPS}|"
    rf"{_STEPS_BY_SEED}|{_WORDS}"
)
_MARKED = re.compile(rf"(?P<value>{_VALUE}|)<!--(?P<what>[^>]+)-->")
FIGURE = re.compile(rf"{_GAP}|{_RATIO}|\d+%|\b\d\.\d{{3}}\b|\*\*(?:{_WORDS})\b")
"""What has to stand before a comment: figures, and verdicts in bold."""
_CHOSEN = {"0.926", "5%", "10%", "95%"}
"""Settings, and the confidence of all intervals."""


def refreshed(page: str) -> str:
    """The page with its figures and verdicts as the tables have them."""
    return _MARKED.sub(lambda found: _marked(found["value"], found["what"]), page)


def unmarked(page: str) -> list[str]:
    """Figures and verdicts without a comment behind them."""
    rest = _MARKED.sub("", page)
    return [found[0] for found in FIGURE.finditer(rest) if found[0] not in _CHOSEN]


def _marked(value: str, what: str) -> str:
    if what == "theirs":
        shown = value
    elif what.startswith("must "):
        # What stands before it is the page's.
        shown = f"{'' if value == NOT_SO else value}{told(what)}"
    else:
        shown = told(what)
    return f"{shown}<!--{what}-->"


def told(what: str) -> str:
    """What a comment stands for; a bar in a cell of a table has a backslash before it."""
    what = what.replace("\\|", "|")
    kind, _, rest = what.partition(" ")
    if kind == "must":
        claim, _, evidence = rest.partition(": ")
        return "" if all(_holds(claim, one) for one in evidence.split("; ")) else NOT_SO
    if kind == "verdict":
        claim, _, evidence = rest.partition(": ")
        states = [_state_of(one) for one in evidence.split("; ")] if evidence else []
        return verdict(claim.rstrip(":"), states)
    if kind == "is":
        return state(reading(rest))
    if kind in _ESTIMATES:
        return _gap(reading(what))
    if kind == "under":
        limit, _, rest = rest.partition(" ")
        section, setting = rest.split(": ")
        found = _first_under(float(limit), study(section), setting)
        return NOT_RUN if found is None else found
    kind = next(kind for kind in _TEXTS if what.startswith(kind))
    section, setting = what.removeprefix(kind).strip().split(": ")
    found = _TEXTS[kind](study(section), setting)
    return NOT_RUN if found is None else found


def _state_of(what: str) -> str:
    """State of what a verdict is about; of a ``back`` ahead where all seeds come back and stay."""
    if not what.startswith("back "):
        return state(reading(what))
    section, _, label = what.removeprefix("back ").partition(": ")
    matchup = _matchup(study(section), label)
    if matchup is None:
        return NOT_RUN
    found = recovery_of(matchup)
    # Between which steps says nothing of how long it takes.
    if found.seeds < FEWEST_SEEDS or (found.recovered and found.steps is None):
        return "too few seeds"
    if 0 < found.recovered < found.seeds:
        return "undecided"
    return "ahead" if found.recovered else "behind"


def _holds(claim: str, what: str) -> bool:
    """Whether words say what the tables do."""
    if claim == "most":
        return state(reading(f"beyond {what}")) == "ahead"
    if claim == "wider":
        section, _, setting = what.partition(": ")
        first, second = (_group(study(section), label) for label in setting.split(" vs "))
        assert first is not None
        assert second is not None
        return _width(first) > _width(second)
    return state(reading(what)) == claim


def _width(group: Group) -> float:
    ends = [run.final_loss for run in group.counted]
    return max(ends) - min(ends)


def state(found: Estimate | None) -> str:
    """Which side a gap is on: decided by the 95% interval of at least three seeds alone."""
    if found is None:
        return NOT_RUN
    if found.n < FEWEST_SEEDS:
        return "too few seeds"
    if not is_decided(found):
        return "undecided"
    return "ahead" if found.mean > 0 else "behind"


def verdict(claim: str, states: list[str]) -> str:
    """What the states of all gaps that a claim is about make of it.

    Args:
        claim: ``ahead`` or ``behind``, which side they are said to be on; ``equal``: on none, which
            an interval can only contradict.
        states: of :func:`state`; those that decide nothing do not count.
    """
    states = [one for one in states if one not in (NOT_RUN, "too few seeds")]
    if not states:
        return "not tested"
    if claim == "equal":
        return "undecided" if set(states) == {"undecided"} else "contradicted"
    other = {"ahead": "behind", "behind": "ahead"}[claim]
    if all(one == claim for one in states):
        return "reproduced"
    if claim in states:
        return "mixed" if other in states else "reproduced in part"
    return "contradicted" if other in states else "undecided"


def reading(what: str) -> Estimate | None:
    """A gap by its comment; None where the runs are missing."""
    kind, _, rest = what.partition(" ")
    section, _, setting = rest.partition(": ")
    return _ESTIMATES[kind](study(section), setting)


@cache
def study(section: str) -> Study:
    """The runs of a section, as the report compares them."""
    table, parameters = SECTIONS[section]
    path = TABLES / f"{table}.csv"
    runs = [run for run in read_results(path) if run.settings["parameters"] == parameters]
    (family,) = families_of(with_differing_arguments(runs))
    return study_of(family)


def _gap(found: Estimate | None) -> str:
    return NOT_RUN if found is None else gap_text(found) + _few(found.n)


def _few(n: int) -> str:
    return f" (n = {n})" if n < FEWEST_SEEDS else ""


def _group(of: Study, label: str) -> Group | None:
    return next((group for group in of.groups if group.label == label and group.counted), None)


def _matchup(of: Study, label: str) -> Matchup | None:
    return next((one for one in of.matchups if one.tst.label == label and one.pairs), None)


def _gain(of: Study, setting: str) -> Gain | None:
    label, longer = setting.split(" on ")
    found = (one for one in gains_of(of) if (one.tst.label, one.longer.label) == (label, longer))
    return next((gain for gain in found if gain.pairs), None)


def _of_matchup(read: Callable[[Matchup], Estimate | None]) -> Callable[..., Estimate | None]:
    def found(of: Study, label: str) -> Estimate | None:
        matchup = _matchup(of, label)
        return None if matchup is None else read(matchup)

    return found


def _of_gain(read: Callable[[Gain], Estimate]) -> Callable[..., Estimate | None]:
    def found(of: Study, setting: str) -> Estimate | None:
        gain = _gain(of, setting)
        return None if gain is None else read(gain)

    return found


def _steps(of: Study, label: str) -> Estimate | None:
    """Steps that a baseline needs more, in units of the run; no interval where it is a bound."""
    matchup = _matchup(of, label)
    length = None if matchup is None else matchup.speed_up_off_ends()
    if length is None:
        return None
    found = length.estimate
    if found is None or found.low is None or found.high is None:
        return Estimate(nan, None, None, None, length.seeds)
    return Estimate(found.mean - 1, found.low - 1, found.high - 1, None, found.n)


def _difference(of: Study, setting: str) -> Estimate | None:
    first, second = (_group(of, label) for label in setting.split(" vs "))
    if first is None or second is None:
        return None
    losses = {run.seed: run.final_loss for run in second.counted}
    gaps = [losses[run.seed] - run.final_loss for run in first.counted if run.seed in losses]
    return estimate(gaps) if gaps else None


def _more(of: Study, setting: str) -> Estimate | None:
    label, _, other = setting.partition(" vs ")
    section, _, other_label = other.partition(": ")
    first, second = _matchup(of, label), _matchup(study(section), other_label)
    if first is None or second is None:
        return None
    gaps = [[pair.gap for pair in one.pairs if pair.gap is not None] for one in (first, second)]
    return unpaired(*gaps)


def unpaired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of the first minus that of the second, with the interval of Welch's t-test.

    Its degrees of freedom are rounded down. At least two values each, not all of them equal; ``n``
    is the smaller count.
    """
    means = [sum(values) / len(values) for values in (first, second)]
    squares = [
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, mean in zip((first, second), means, strict=True)
    ]
    error = sqrt(sum(squares))
    shares = zip(squares, (len(first), len(second)), strict=True)
    degrees = int(error**4 / sum(square**2 / (n - 1) for square, n in shares))
    difference, reach = means[0] - means[1], t_quantile(degrees) * error
    n = min(len(first), len(second))
    return Estimate(difference, difference - reach, difference + reach, error, n)


_ESTIMATES: dict[str, Callable[[Study, str], Estimate | None]] = {
    "gap": _of_matchup(lambda one: one.gap),
    "data": _of_matchup(lambda one: one.equal_data_off_ends()),
    "diff": _difference,
    "more": _more,
    "steps": _steps,
    "total": _of_gain(lambda gain: gain.total),
    "decay": _of_gain(lambda gain: gain.decay),
    "bags": _of_gain(lambda gain: gain.bags),
    "beyond": _of_gain(lambda gain: estimate([one.decay - one.bags for one in gain.pairs])),
}


def _share(of: Study, setting: str) -> str | None:
    gain = _gain(of, setting)
    share = None if gain is None else gain.decay_share
    return None if gain is None or share is None else f"{share:.0%}{_few(gain.total.n)}"


def _speed(of: Study, label: str) -> str | None:
    matchup = _matchup(of, label)
    found = None if matchup is None else matchup.speed_up_off_ends()
    if found is None:
        return None
    if found.estimate is not None:
        return ratio_text(found.estimate) + _few(found.estimate.n)
    return " and ".join(_bounds(found))


def _bounds(found: Length) -> list[str]:
    bounds = (
        ("more", found.longest, found.beyond),
        ("less", found.shortest, found.below),
    )
    return [
        f"{word} than {length:.3g}{TIMES} in {count} of {found.seeds} seeds"
        for word, length, count in bounds
        if count
    ]


def _ends(of: Study, label: str) -> str | None:
    group = _group(of, label)
    if group is None:
        return None
    return _listed([f"{run.final_loss:.3f}" for run in group.counted])


def _first_under(limit: float, of: Study, label: str) -> str | None:
    group = _group(of, label)
    if group is None:
        return None
    under = [run.steps[run.validation_loss < limit] for run in group.counted]
    return _listed([str(steps[0]) if steps.size else "never" for steps in under])


def _listed(values: list[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} and {last}" if most else last


def _back(of: Study, label: str) -> str | None:
    matchup = _matchup(of, label)
    return None if matchup is None else recovery_of(matchup).text


def _phase_1(of: Study, label: str) -> str | None:
    group = _group(of, label)
    if group is None:
        return None
    losses = [
        run.training_loss[(run.training_steps >= 500) & (run.training_steps <= run.switch_step)]
        for run in group.runs
    ]
    return f"{np.concatenate(losses).mean():.2f}"


def _seeds(of: Study, label: str) -> str | None:
    group = _group(of, label)
    return None if group is None else str(len(group.counted))


_TEXTS: dict[str, Callable[[Study, str], str | None]] = {
    "share": _share,
    "speed": _speed,
    "ends": _ends,
    "back": _back,
    "phase 1": _phase_1,
    "seeds": _seeds,
}


_FIGURE_LINE = re.compile(
    r"(!\[[^\]]*\]\(images/results/(\w+)/([\w-]+)\.png\)\n\n)(.*?)(?=\n\n|\Z)", re.S
)


def with_captions(page: str) -> str:
    """The page with the report's captions below its figures, and their vector form."""

    def caption(found: re.Match[str]) -> str:
        image, table, name, _ = found.groups()
        text = captions_of(table)[name]
        return f"{image}{text} ([PDF](images/results/{table}/{name}.pdf))"

    return _FIGURE_LINE.sub(caption, page)


@cache
def captions_of(table: str) -> dict[str, str]:
    """Captions of all plots of a table, by name."""
    runs = with_differing_arguments(read_results(TABLES / f"{table}.csv"))
    return captions([study_of(family) for family in families_of(runs)])


def main() -> None:
    """Writes the page anew, and the figures that other pages quote."""
    PAGE.write_text(with_captions(refreshed(PAGE.read_text())))
    CHOOSING.write_text(refreshed(CHOOSING.read_text()))


if __name__ == "__main__":
    main()
