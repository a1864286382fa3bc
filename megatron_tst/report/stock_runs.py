"""Reads runs that are not this project's: TensorBoard folders of stock Megatron-LM.

Megatron writes its arguments to TensorBoard as texts, one a tag, so that a folder says which model,
data and batch it was; what it does not say is stated by whoever compares.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.checked_settings import checked_settings
from megatron_tst.report.describing import (
    DATA_KEYS,
    Setting,
    describe_data,
    describe_numerics,
    describe_settings,
    phases_of,
    status_of,
    thin_training_loss,
)
from megatron_tst.report.events import FloatArray, Series, read_scalars, read_texts
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import NOT_LOGGED, TRAINING_LOSS, VALIDATION_LOSS, seconds_at
from megatron_tst.settings.phases import bags_of

_ITERATION_TIME = "iteration-time"


def read_stock_run(
    folder: Path, name: str, stated: Mapping[str, Setting], where: str = ""
) -> RunResult:
    """Reads a folder of event files that has no ``tst_run.json``.

    Args:
        folder: TensorBoard folder.
        name: name of the run.
        stated: what the folder does not say or says wrongly: ``tokens_per_step``, ``bag_size`` and
            ``switch_step`` of the user's own superposition, or any setting or data key.
        where: it was stated, for errors; the folder by default.

    Raises:
        UsageError: naming the folder and what is missing, or a setting that cannot be.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: pass the folder of a run.")
    scalars, arguments = read_scalars(folder), _arguments(folder)
    validation = scalars.get(VALIDATION_LOSS)
    if validation is None:
        raise UsageError(
            f"{folder} has no values of {VALIDATION_LOSS!r}: pass the --tensorboard-dir of a run "
            "that evaluated at least once (--eval-interval)."
        )
    settings = _settings(arguments, validation, stated, where or str(folder))
    tokens_per_step = _tokens_per_step(folder, scalars, arguments, stated)
    equivalent = (validation.steps * tokens_per_step).astype(np.int64)
    phases = phases_of(settings)
    # Positions more, in units of a step, that bags read.
    extra = sum(
        (phase.tokens_per_position - 1) * np.clip(validation.steps - phase.first_step, 0, length)
        for phase, (_, length) in zip(phases, bags_of(phases), strict=False)
    )
    training = scalars.get(TRAINING_LOSS, NOT_LOGGED)
    training_steps, training_loss = thin_training_loss(training, phases)
    data = {**describe_data(arguments), **{k: v for k, v in stated.items() if k in DATA_KEYS}}
    return RunResult(
        name=name,
        status=status_of(settings, validation, training),
        settings=settings,
        data=data,
        machine="",
        commit="",
        steps=validation.steps,
        validation_loss=validation.values,
        equivalent_tokens=equivalent,
        data_tokens=equivalent + np.asarray(extra * tokens_per_step).astype(np.int64),
        seconds=_seconds(scalars, validation),
        training_steps=training_steps,
        training_loss=training_loss,
        arguments=arguments_that_can_matter(arguments),
        numerics=describe_numerics(arguments),
        source=name,
    )


def _arguments(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in read_texts(folder).items():
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if text.startswith("torch."):
            # A dtype, which Megatron makes of other arguments and runs here do not record.
            continue
        # A split such as 98,2,0 is no tuple.
        found[name] = text if isinstance(value, tuple) else value
    return found


def _settings(
    arguments: Mapping[str, Any], validation: Series, stated: Mapping[str, Setting], where: str
) -> dict[str, Setting]:
    recorded = {
        "total_steps": int(validation.steps[-1]),
        **describe_settings(arguments),
        "sequence_length": arguments.get("seq_length"),
        "global_batch_size": arguments.get("global_batch_size"),
    }
    # The length of a sequence is a setting too.
    not_settings = {*DATA_KEYS, "tokens_per_step"} - {"sequence_length"}
    own = {key: value for key, value in stated.items() if key not in not_settings}
    return checked_settings({**recorded, **own}, where)


def _tokens_per_step(
    folder: Path,
    scalars: Mapping[str, Series],
    arguments: Mapping[str, Any],
    stated: Mapping[str, Setting],
) -> float:
    if "tokens_per_step" in stated:
        return float(stated["tokens_per_step"])
    sizes = scalars.get("batch-size")
    length = stated.get("sequence_length", arguments.get("seq_length"))
    if sizes is not None and length is not None and np.ptp(sizes.values) == 0:
        return float(sizes.values[0]) * float(length)
    if arguments.get("global_batch_size") and length is not None and sizes is None:
        return float(arguments["global_batch_size"]) * float(length)
    raise UsageError(
        f"{folder} does not say how many tokens a step has, or their number changes: state the "
        "mean, sequences times sequence length, as in --run NAME=FOLDER,tokens_per_step=1048576."
    )


def _seconds(scalars: Mapping[str, Series], validation: Series) -> FloatArray:
    """Time in training steps at the validations; NaN if the run did not log it."""
    times = scalars.get(_ITERATION_TIME, NOT_LOGGED)
    elapsed = np.cumsum(np.diff(times.steps, prepend=0) * times.values)
    return seconds_at(validation.steps.astype(np.float64), Series(times.steps, elapsed))
