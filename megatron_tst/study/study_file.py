"""Reads a study file: a grid of runs over one text, see docs/studies.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_tst.common.errors import UsageError
from megatron_tst.study.config import MAX_EPOCHS, StudyConfig, Validation
from megatron_tst.study.file_values import mapping, number, switch
from megatron_tst.study.grid import check_names, controls_of, grid_of, once
from megatron_tst.study.settings import Scalar

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


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last without a word.

    So it does a key that is no text, as ``{{ corpus }}`` without quotes makes.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "a list or a mapping is no key: write text with brackets or braces in quotes",
                    key.start_mark,
                )
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is there twice: leave one out", key.start_mark
                )
            keys.add(key.value)
        return node


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
    top = mapping(content, "the study", required=_TOP, optional=_OPTIONAL)
    schedule = mapping(top["schedule"], "schedule", required=_SCHEDULE)
    models = {
        str(name): _arguments(arguments, f"models.{name}")
        for name, arguments in mapping(top["models"], "models").items()
    }
    processes = number(top.get("processes", 1), "processes", int, 1)
    grid = once(grid_of(top["arms"], top["defaults"], top["seeds"]))
    controls = controls_of(grid) if switch(top.get("controls", True), "controls") else ()
    study = StudyConfig(
        arguments=_arguments(top["arguments"], "arguments"),
        models=models,
        warmup_share=number(schedule["warmup_share"], "schedule.warmup_share", float, 0.0, 1.0),
        decay_share=number(schedule["decay_share"], "schedule.decay_share", float, 0.0, 1.0),
        validation=_validation(top["validation"], processes),
        checkpoints=number(top.get("checkpoints", 0), "checkpoints", int, 0),
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
        number(arguments["seq-length"], "seq-length", int, 1)
    check_names(study.grid)
    return study


def _validation(value: Any, processes: int) -> Validation:
    given = mapping(value, "validation", required=_VALIDATION)
    numbers = {key: number(given[key], f"validation.{key}", int, 1) for key in _VALIDATION}
    if numbers["batch_size"] % processes:
        raise UsageError(
            f"validation.batch_size is {numbers['batch_size']}: use a multiple of processes, "
            f"{processes}."
        )
    return Validation(**numbers)


def _arguments(value: Any, where: str) -> dict[str, Scalar | list[Scalar]]:
    """Megatron arguments, none of which the study sets itself."""
    given = mapping(value, where)
    for name, argument in given.items():
        if name in _OWN_FLAGS or (str(name).startswith("tst-") and name != MAX_EPOCHS):
            key = _OWN_FLAGS.get(name, "the keys of an arm")
            raise UsageError(f"{where} has {name}: set it by {key}.")
        if argument is None or argument is False or isinstance(argument, dict):
            raise UsageError(
                f"{where}.{name} is {argument!r}: use a value or a list; true for a flag without "
                "one, and no entry for a flag that is not to be passed."
            )
    return given
