"""Reads a study file: a grid of runs over one text, see docs/studies.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.setting_fields import KEYS, worded
from megatron_tst.study.settings import AXES, RunSettings, Scalar

_SCHEDULE = ("warmup_share", "decay_share")
_VALIDATION = ("times", "tokens", "batch_size")
_TOP = ("arguments", "models", "schedule", "validation", "defaults", "seeds", "arms")
_OPTIONAL = ("checkpoints", "processes", "controls")
# Set from the keys of the study, once for all of its runs.
_OWN_FLAGS = {
    "train-iters": "total_steps",
    "lr": "learning_rate",
    "lr-warmup-iters": "schedule.warmup_share",
    "lr-wsd-decay-iters": "schedule.decay_share",
    "seed": "seeds",
    "eval-interval": "validation.times",
    "eval-iters": "validation.tokens",
    "eval-micro-batch-size": "validation.batch_size",
    "eval-global-batch-size": "validation.batch_size",
    "save-interval": "checkpoints",
    "save": "--output of tst study",
    "load": "--output of tst study",
    "tensorboard-dir": "--output of tst study",
    "data-cache-path": "--output of tst study",
}


# Of what YAML reads otherwise: 2:0.3 without quotes is a time, 120.3 seconds.
_EXAMPLES = {"schedule": '"8:0.05,4:0.1"', "bag_sizes": '"2,4"'}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is there twice: leave one out", key.start_mark
                )
            if isinstance(key.value, str):
                keys.add(key.value)
        return node


@dataclass(frozen=True)
class Validation:
    """How the runs are evaluated, all on the same text.

    Attributes:
        times: evaluations a run, evenly spaced.
        tokens: at least so many of the validation text each time.
        batch_size: sequences a forward pass; memory against speed.
    """

    times: int
    tokens: int
    batch_size: int


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        settings: what distinguishes it.
        arguments: its Megatron command line without the paths of its outputs.
    """

    settings: RunSettings
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique in the study."""
        return self.settings.name


@dataclass(frozen=True)
class StudyConfig:
    """A study file.

    Attributes:
        arguments: Megatron arguments of all runs, by name without the dashes.
        models: Megatron arguments of each model.
        warmup_share: fraction of a run's steps in which the learning rate rises.
        decay_share: fraction of a run's steps, at its end, in which it falls.
        validation: how runs are evaluated.
        checkpoints: how many are kept ready to go on from, a run; 0: a broken run starts anew.
        processes: ranks of each run.
        grid: every run, each once; the controls last.
        controls: how many of them are baselines that no arm lists: each run with superposition has
            one of its model, length, learning rate and seed.
    """

    arguments: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    warmup_share: float
    decay_share: float
    validation: Validation
    checkpoints: int
    processes: int
    grid: tuple[RunSettings, ...]
    controls: int

    def runs(self) -> list[StudyRun]:
        """All runs, the first seed of every arm before the second of any."""
        ordered = sorted(self.grid, key=lambda run: run.seed)
        return [StudyRun(run, tuple(self._arguments_of(run))) for run in ordered]

    def common(self) -> dict[str, Any]:
        """What two runs must share to be of one study, as plain values."""
        shared = ("warmup_share", "decay_share", "processes")
        return {
            "arguments": dict(self.arguments),
            **{name: getattr(self, name) for name in shared},
            "validation": vars(self.validation),
        }

    def _arguments_of(self, run: RunSettings) -> list[str]:
        merged = {**self.arguments, **self.models[run.model]}
        length, batch = int(merged["seq-length"]), self.validation.batch_size
        evaluation = {
            # One short of every share, as pretrain evaluates after the last step in any case.
            "eval-interval": run.total_steps // self.validation.times + 1,
            "eval-iters": -(-self.validation.tokens // (batch * length)),
            "eval-micro-batch-size": batch // self.processes,
            "eval-global-batch-size": batch,
        }
        if self.checkpoints:
            evaluation["save-interval"] = max(run.total_steps // self.checkpoints, 1)
        return [
            *command_line(merged),
            *command_line(evaluation),
            *run.arguments(self.warmup_share, self.decay_share),
        ]


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """``{"bf16": True, "lr": 0.1}`` as ``["--bf16", "--lr", "0.1"]``."""
    parts: list[str] = []
    for name, value in arguments.items():
        parts.append(f"--{name}")
        if isinstance(value, list):
            parts += [str(item) for item in value]
        elif value is not True:
            parts.append(str(value))
    return parts


def read_study(path: Path) -> StudyConfig:
    """Reads and checks a study file.

    Raises:
        UsageError: naming the file, the key, its value and the remedy.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # Text in another encoding, and dates that there are not.
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return _study(content)
    except UsageError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def _study(content: Any) -> StudyConfig:
    top = _mapping(content, "the study", required=_TOP, optional=_OPTIONAL)
    schedule = _mapping(top["schedule"], "schedule", required=_SCHEDULE)
    models = {
        str(name): _arguments(arguments, f"models.{name}")
        for name, arguments in _mapping(top["models"], "models").items()
    }
    processes = _number(top.get("processes", 1), "processes", int, 1)
    grid = _once(_grid(top["arms"], top["defaults"], top["seeds"]))
    controls = _controls(grid) if _switch(top.get("controls", True), "controls") else ()
    study = StudyConfig(
        arguments=_arguments(top["arguments"], "arguments"),
        models=models,
        warmup_share=_number(schedule["warmup_share"], "schedule.warmup_share", float, 0.0, 1.0),
        decay_share=_number(schedule["decay_share"], "schedule.decay_share", float, 0.0, 1.0),
        validation=_validation(top["validation"], processes),
        checkpoints=_number(top.get("checkpoints", 0), "checkpoints", int, 0),
        processes=processes,
        grid=(*grid, *controls),
        controls=len(controls),
    )
    for run in study.grid:
        if run.model not in models:
            known = ", ".join(models)
            raise UsageError(f"model is {run.model!r}: it is not under models ({known}).")
        arguments = {**study.arguments, **models[run.model]}
        if "seq-length" not in arguments:
            raise UsageError("arguments has no seq-length: add it there or to each model.")
        _number(arguments["seq-length"], "seq-length", int, 1)
    _check_names(study.grid)
    return study


def _validation(value: Any, processes: int) -> Validation:
    given = _mapping(value, "validation", required=_VALIDATION)
    numbers = {key: _number(given[key], f"validation.{key}", int, 1) for key in _VALIDATION}
    if numbers["batch_size"] % processes:
        raise UsageError(
            f"validation.batch_size is {numbers['batch_size']}: use a multiple of processes, "
            f"{processes}."
        )
    return Validation(**numbers)


def _grid(arms: Any, defaults: Any, seeds: Any) -> Iterable[RunSettings]:
    if not isinstance(arms, list) or not arms:
        raise UsageError("arms is empty: list the arms, {} for one with the defaults.")
    known = set(AXES) - {"seed"}
    common = _mapping(defaults, "defaults", optional=known)
    for i, arm in enumerate(arms, start=1):
        where = f"arms, entry {i}"
        axes = {**common, **_mapping(arm, where, optional={*known, "seeds"})}
        axes["seed"] = axes.pop("seeds", seeds)
        for missing in {"model", "total_steps", "learning_rate"} - set(axes):
            raise UsageError(f"{where} has no {missing}: set it there or under defaults.")
        yield from _product(axes, where)


def _once(runs: Iterable[RunSettings]) -> tuple[RunSettings, ...]:
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


def _check_names(grid: Iterable[RunSettings]) -> None:
    """Refuses two runs of one name, which would share a folder."""
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


def _controls(grid: Sequence[RunSettings]) -> tuple[RunSettings, ...]:
    """The baselines without which the gains of the grid cannot be told from those of a decay."""
    wanted = dict.fromkeys(run.control for run in grid if not run.is_baseline)
    return tuple(run for run in wanted if run not in grid)


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: use true or false.")
    return value


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
        return _number(value, name, AXES[name], 0 if AXES[name] is int else float("-inf"))
    if name == "model" and isinstance(value, int | float):
        # As the names under models are.
        return str(value)
    if not isinstance(value, str):
        example = f", as in {name}: {_EXAMPLES[name]}" if name in _EXAMPLES else ""
        raise UsageError(f"{name} is {value!r} as YAML reads it: write text, in quotes{example}.")
    return value


def _number(
    value: Any,
    name: str,
    kind: type[Any],
    least: float = float("-inf"),
    most: float = float("inf"),
) -> Any:
    """A number of the file.

    Raises:
        UsageError: it is none, or outside ``least`` to ``most``.
    """
    try:
        number = kind(value)
        good = not isinstance(value, bool) and number == float(value) and isfinite(number)
        good = good and least <= number <= most
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        kinds = "a whole number" if kind is int else "a number"
        bounds = "" if least == float("-inf") else f" of at least {least:g}"
        bounds += "" if most == float("inf") else f" and at most {most:g}"
        raise UsageError(f"{name} is {value!r}: use {kinds}{bounds}.")
    return number


def _arguments(value: Any, where: str) -> dict[str, Scalar | list[Scalar]]:
    """Megatron arguments, none of which the study sets itself."""
    given = _mapping(value, where)
    for name, argument in given.items():
        if str(name).startswith("tst-") or name in _OWN_FLAGS:
            key = _OWN_FLAGS.get(name, "the keys of an arm")
            raise UsageError(f"{where} has {name}: set it by {key}.")
        if argument is None or argument is False or isinstance(argument, dict):
            raise UsageError(
                f"{where}.{name} is {argument!r}: use a value or a list; true for a flag without "
                "one, and no entry for a flag that is not to be passed."
            )
    return given


def _mapping(
    value: Any,
    where: str,
    required: Iterable[str] = (),
    optional: Iterable[str] | None = None,
) -> dict[str, Any]:
    """A mapping with known keys; any key if ``required`` and ``optional`` are left out."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}: write keys with values, as docs/studies.md shows.")
    required = tuple(required)
    known = {*required, *(optional or ())}
    if required or optional is not None:
        for key in value:
            if key not in known:
                raise UsageError(
                    f"{where} has the unknown key {key!r}: use {', '.join(sorted(known))}."
                )
    for key in required:
        if key not in value:
            raise UsageError(f"{where} has no {key}: add it.")
    return dict(value)
