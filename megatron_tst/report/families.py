"""Sorts runs: what can be compared with what, and which runs differ in their seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_tst.common.errors import UsageError
from megatron_tst.common.units import quantity
from megatron_tst.report.arguments import argument_of
from megatron_tst.report.compared_settings import differing
from megatron_tst.report.describing import MODEL_SETTINGS, NUMERICS, Setting
from megatron_tst.report.labels import labels_of
from megatron_tst.report.results import RunResult
from megatron_tst.settings.phases import is_superposed


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what sets the group apart in its family.
        settings: of all its runs, without the seed.
        runs: by seed.
    """

    label: str
    settings: dict[str, Setting]
    runs: tuple[RunResult, ...]

    @property
    def is_baseline(self) -> bool:
        """Whether its runs have no superposition."""
        return not is_superposed(self.settings)

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """The runs that means are taken over: finished ones; unfinished if none is finished."""
        finished = tuple(run for run in self.runs if run.status == "finished")
        unfinished = (run for run in self.runs if run.status == "unfinished" and run.steps.size)
        return finished or tuple(unfinished)

    @property
    def is_finished(self) -> bool:
        """Whether it has runs that count, and these reached their last step."""
        return bool(self.counted) and self.counted[0].status == "finished"

    @property
    def diverged(self) -> tuple[RunResult, ...]:
        """The runs whose loss means nothing."""
        return tuple(run for run in self.runs if run.status == "diverged")

    @property
    def total_steps(self) -> int:
        """Steps of each of its runs."""
        return self.runs[0].total_steps


@dataclass(frozen=True, eq=False)
class Family:
    """Runs with equal data and equal model, whose losses can be compared.

    Attributes:
        name: model and text, and what else sets it apart from other families.
        groups: baselines first, then by label.
    """

    name: str
    groups: tuple[Group, ...]

    @property
    def runs(self) -> list[RunResult]:
        """All runs, by group."""
        return [run for group in self.groups for run in group.runs]


def families_of(runs: Sequence[RunResult]) -> list[Family]:
    """Separates runs whose losses cannot be compared, the largest family first.

    Raises:
        UsageError: two runs have one name, or the same settings and seed.
    """
    runs = with_differing_arguments(runs)
    _refuse_duplicates(runs)
    by_key: dict[object, list[RunResult]] = {}
    for run in runs:
        by_key.setdefault(_key(_identity(run)), []).append(run)
    members = sorted(by_key.values(), key=len, reverse=True)
    names = _family_names(members)
    return [
        Family(name, tuple(_groups(family))) for name, family in zip(names, members, strict=True)
    ]


def with_differing_arguments(runs: Sequence[RunResult]) -> list[RunResult]:
    """Adds to the settings of runs the arguments and the numerics in which comparable runs differ.

    So runs that differ in one are not taken for runs of the same settings, and it is named. What a
    run did not record is not added to it. An argument that is off is as one that is not there: a
    release that has more of them does not differ by these.
    """
    members: dict[object, list[RunResult]] = {}
    for run in runs:
        members.setdefault(_key(_identity(run)), []).append(run)
    names = {key: _told_apart_by(family) for key, family in members.items()}
    return [_with(run, names[_key(_identity(run))]) for run in runs]


def _told_apart_by(runs: Sequence[RunResult]) -> list[str]:
    """Arguments and numerics that runs differ in, or that are settings of one of them already."""
    names = [*sorted({name for run in runs for name in run.arguments}), *NUMERICS]
    return [
        name
        for name in names
        if any(name in run.settings for run in runs)
        or len({_recorded_value(run, name) for run in runs} - {None}) > 1
    ]


def _with(run: RunResult, names: Sequence[str]) -> RunResult:
    found = {name: _recorded_value(run, name) for name in names}
    added = {name: value for name, value in found.items() if value is not None}
    settings = {**added, **{k: v for k, v in run.settings.items() if k not in added}}
    return run if settings == run.settings else replace(run, settings=settings)


def _recorded_value(run: RunResult, name: str) -> Setting | None:
    """An argument or a part of the numerics; None where the run does not tell."""
    if name in run.settings:
        # Stated, or out of a table.
        return argument_of(run.settings, name)
    if name in NUMERICS:
        return run.numerics.get(name)
    return argument_of(run.arguments, name) if run.arguments else None


def incomparable(first: RunResult, second: RunResult) -> list[str]:
    """Names of what keeps the losses of two runs from being compared: data and model."""
    return differing([_identity(first), _identity(second)])


def _refuse_duplicates(runs: Sequence[RunResult]) -> None:
    seen: dict[object, str] = {}
    names: set[str] = set()
    for run in runs:
        if run.name in names:
            raise UsageError(
                f"two runs are called {run.name}: name them apart with --run NAME=FOLDER."
            )
        names.add(run.name)
        twin = seen.setdefault((_key(_identity(run)), _key(run.settings)), run.name)
        if twin != run.name:
            raise UsageError(
                f"runs {twin} and {run.name} have the same settings and seed {run.seed}: leave "
                "one out; a copy is no second seed."
            )


def _identity(run: RunResult) -> dict[str, Setting]:
    model = {name: run.settings[name] for name in MODEL_SETTINGS if name in run.settings}
    if "hidden_size" in model:
        # Follows from the shape, and a stock Megatron run does not record it.
        model.pop("parameters", None)
    return {**run.data, **model}


def _key(settings: Mapping[str, Setting]) -> frozenset[tuple[str, Setting]]:
    return frozenset(settings.items())


def _family_names(families: Sequence[Sequence[RunResult]]) -> list[str]:
    identities = [_identity(family[0]) for family in families]
    in_name = ("data_path", *MODEL_SETTINGS) if all(map(_sizes, families)) else ("data_path",)
    apart = [name for name in differing(identities) if name not in in_name]
    return [
        ", ".join([_family_name(family), *(f"{key} {_recorded(identity, key)}" for key in apart)])
        for family, identity in zip(families, identities, strict=True)
    ]


def _recorded(settings: Mapping[str, Setting], name: str) -> Setting:
    return settings.get(name, "not recorded")


def _sizes(runs: Sequence[RunResult]) -> list[float]:
    return [float(run.settings["parameters"]) for run in runs if "parameters" in run.settings]


def _family_name(runs: Sequence[RunResult]) -> str:
    sizes = _sizes(runs)
    model = f"{quantity(sizes[0])} parameters" if sizes else "A model of unrecorded size"
    return f"{model} on {runs[0].data.get('data_path', 'a corpus that is not recorded')}"


def _groups(runs: Iterable[RunResult]) -> list[Group]:
    by_key: dict[object, list[RunResult]] = {}
    for run in runs:
        by_key.setdefault(_key(_without_seed(run.settings)), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in by_key.values()]
    settings = [_without_seed(group[0].settings) for group in members]
    labels = labels_of(settings, [len(group) for group in members])
    groups = [
        Group(label, chosen, tuple(group))
        for label, chosen, group in zip(labels, settings, members, strict=True)
    ]
    return sorted(groups, key=_order)


def _order(group: Group) -> tuple[object, ...]:
    settings = group.settings
    size, ratio = settings.get("bag_size", 1), float(settings.get("step_ratio", 0))
    return (not group.is_baseline, size, ratio, group.total_steps, group.label)


def _without_seed(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {name: value for name, value in settings.items() if name not in ("seed", "parameters")}
