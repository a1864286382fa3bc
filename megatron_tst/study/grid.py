"""Expands the arms of a study file into its runs, each once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.setting_fields import KEYS, worded
from megatron_tst.study.file_values import mapping, number
from megatron_tst.study.settings import AXES, RunSettings

# Of what YAML reads otherwise: 2:0.3 without quotes is a time, 120.3 seconds.
_EXAMPLES = {"schedule": '"8:0.05,4:0.1"', "bag_sizes": '"2,4"'}


def grid_of(arms: Any, defaults: Any, seeds: Any) -> Iterable[RunSettings]:
    """Every run that the arms list, some perhaps twice.

    Args:
        arms: entries of the file.
        defaults: axes of arms that leave them out.
        seeds: of arms without their own.

    Raises:
        UsageError: naming the entry, its key, the value and the remedy.
    """
    if not isinstance(arms, list) or not arms:
        raise UsageError("arms is empty: list the arms, {} for one with the defaults.")
    known = set(AXES) - {"seed"}
    common = mapping(defaults, "defaults", optional=known)
    for i, arm in enumerate(arms, start=1):
        where = f"arms, entry {i}"
        axes = {**common, **mapping(arm, where, optional={*known, "seeds"})}
        axes["seed"] = axes.pop("seeds", seeds)
        for missing in {"model", "total_steps", "learning_rate"} - set(axes):
            raise UsageError(f"{where} has no {missing}: set it there or under defaults.")
        yield from _product(axes, where)


def once(runs: Iterable[RunSettings]) -> tuple[RunSettings, ...]:
    """Runs, each once, also if two entries have it in different words.

    Raises:
        UsageError: two runs train the same and would be reported as two settings.
    """
    found: dict[frozenset[tuple[str, Any]], RunSettings] = {}
    for run in dict.fromkeys(runs):
        trained = {name: value for name, value in run.reported().items() if name != "step_ratio"}
        first = found.setdefault(frozenset(trained.items()), run)
        ratios = [one.reported().get("step_ratio") for one in (first, run)]
        if ratios[0] != ratios[1]:
            raise UsageError(
                f"{first.name} and {run.name} are one run: step_ratio {ratios[0]:g} and "
                f"{ratios[1]:g} of {run.total_steps} steps switch at one step, "
                f"{trained['switch_step']}: leave one of them out."
            )
    return tuple(found.values())


def check_names(grid: Iterable[RunSettings]) -> None:
    """Raises a UsageError over two runs of one name, which would share a folder."""
    by_name: dict[str, RunSettings] = {}
    for run in grid:
        first = by_name.setdefault(run.name, run)
        if first != run:
            values = first.to_dict()
            apart = [
                f"{name} {values[name]!r} and {value!r}"
                for name, value in run.to_dict().items()
                if values[name] != value
            ]
            raise UsageError(
                f"two runs are called {run.name}, with {', '.join(apart)}: names hold six digits "
                "of a number, let them differ in these."
            )


def controls_of(grid: Sequence[RunSettings]) -> tuple[RunSettings, ...]:
    """The baselines without which the gains of the grid cannot be told from those of a decay."""
    wanted = dict.fromkeys(run.control for run in grid if not run.is_baseline)
    return tuple(run for run in wanted if run not in grid)


def _product(axes: Mapping[str, Any], where: str) -> Iterable[RunSettings]:
    """Every combination of the values of an arm."""
    lists = [value if isinstance(value, list) else [value] for value in axes.values()]
    for name, values in zip(axes, lists, strict=True):
        if not values:
            raise UsageError(f"{where}: {name} is an empty list: give it a value.")
    for combination in itertools.product(*lists):
        given = zip(axes, combination, strict=True)
        try:
            with worded(KEYS):
                run = RunSettings.of(**{name: _setting(name, value) for name, value in given})
                run.check()
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        yield run


def _setting(name: str, value: Any) -> Any:
    """A value of an axis as its type; YAML reads 1e-3 as text."""
    if value is None and name in SETTINGS and SETTINGS[name].is_optional:
        return value
    if AXES[name] is not str:
        return number(value, name, AXES[name], 0 if AXES[name] is int else float("-inf"))
    if name == "model" and isinstance(value, int | float):
        # As the names under models are.
        return str(value)
    if not isinstance(value, str):
        example = f", as in {name}: {_EXAMPLES[name]}" if name in _EXAMPLES else ""
        raise UsageError(f"{name} is {value!r} as YAML reads it: write text, in quotes{example}.")
    return value
