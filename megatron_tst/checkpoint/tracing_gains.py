"""Measures what tells where a gain comes from: losses by position, gradients, Adam's state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tst.checkpoint.evaluated import SavedCheckpoint, read_saved, run_on
from megatron_tst.checkpoint.saved_state import SECOND_MOMENT, read_saved_state
from megatron_tst.checkpoint.torch_dist_index import whole_checkpoints
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.evaluate import Evaluation, EvaluationConfig, prepare
from megatron_tst.report.describing import describe_machine
from megatron_tst.report.origins import (
    CHECKPOINTS_AFTER,
    GRADIENT,
    MOMENT,
    POSITION,
    POSITION_TOKENS,
    STEPS_AFTER,
    STEPS_BEFORE,
    TEXT,
    TRAINING,
    VALIDATION,
    Key,
    Trace,
    check_comparable,
)
from megatron_tst.report.results import all_settings_of
from megatron_tst.report.runs import TRAINING_LOSS, VALIDATION_LOSS, Run, read_run

_GRADIENT_NORM = "grad-norm"


def trace_arms(
    arms: Mapping[str, Sequence[Path]],
    output: Path,
    text: Path | None,
    tokenizer: Path | None,
    batch_size: int,
    display: TaskProgress,
) -> list[Trace]:
    """Measures runs.

    Folders of one arm and seed are one run: a run and a continuation of it that logged more, say.
    Where both have a value the later folder's counts.

    Args:
        arms: folders of runs by the name of the arm, each with ``tensorboard`` and, for all but
            scalars, ``checkpoints``.
        output: file beside which checkpoints are exported for a while.
        text: file, or folder of files; None to leave it out.
        tokenizer: folder of the Hugging Face tokenizer, for ``text``.
        batch_size: sequences of the text at once.
        display: shows how far it is.

    Raises:
        UsageError: a folder is no run, runs cannot be compared, or a checkpoint cannot be read or
            evaluated.
    """
    runs = {name: [read_run(f, may_lack_scalars=True) for f in arms[name]] for name in arms}
    every = [run for each in runs.values() for run in each]
    lengths = sorted({run.info["sequence_length"] for run in every})
    if len(lengths) > 1:
        raise UsageError(
            f"--arm: the runs have sequences of {' and '.join(map(str, lengths))} tokens: compare "
            "runs of one --seq-length."
        )
    # Before anything is measured, which takes minutes.
    check_comparable([_empty(name, run, None) for name, each in runs.items() for run in each])
    evaluation = None
    if text is not None:
        [length] = lengths
        evaluation = prepare(
            EvaluationConfig(
                output,
                text=text,
                window=length,
                stride=length,
                by_position=True,
                batch_size=batch_size,
            )
        )
    around = next((run.info["switch_step"] for run in every if run.schedule.config.enabled), None)
    traces: dict[tuple[str, int], Trace] = {}
    for name, run in ((name, run) for name, each in runs.items() for run in each):
        trace = traces.setdefault((name, run.info["seed"]), _empty(name, run, evaluation))
        _measure(trace, run, around, evaluation, tokenizer, display)
    for trace in traces.values():
        # As in a table, from which the same document follows.
        trace.values.update({key: float(f"{v:.6g}") for key, v in trace.values.items()})
    return list(traces.values())


def _measure(
    trace: Trace,
    run: Run,
    around: int | None,
    evaluation: Evaluation | None,
    tokenizer: Path | None,
    display: TaskProgress,
) -> None:
    trace.values.update(_scalars(run, around))
    for step, checkpoint in whole_checkpoints(run.folder / "checkpoints").items():
        is_near = around is not None and 0 <= step - around <= CHECKPOINTS_AFTER
        if not is_near and step != trace.total_steps:
            continue
        saved = read_saved(checkpoint)
        trace.values.update(second_moments(saved))
        if evaluation is not None and tokenizer is not None:
            results, _ = run_on(evaluation, saved, tokenizer, display, warns=False)
            losses = _text_losses(step, results["text"], step == trace.total_steps)
            trace.values.update(losses)


def _empty(arm: str, run: Run, evaluation: Evaluation | None) -> Trace:
    config = run.schedule.config
    return Trace(
        arm=arm,
        seed=run.info["seed"],
        total_steps=run.info["total_steps"],
        switch_step=run.info["switch_step"] if config.enabled else None,
        bag_size=max(phase.bag_size for phase in run.schedule.phases),
        text=None if evaluation is None else evaluation.settings["text_sha256"],
        machine=describe_machine(run.info["machine"]),
        commit=run.info["commit"],
        settings=all_settings_of(run),
    )


def _scalars(run: Run, around: int | None) -> dict[Key, float]:
    found: dict[Key, float] = {}
    tags = {VALIDATION: VALIDATION_LOSS, TRAINING: TRAINING_LOSS, GRADIENT: _GRADIENT_NORM}
    for quantity, tag in tags.items():
        series = run.series(tag)
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            is_near = around is not None and -STEPS_BEFORE < step - around <= STEPS_AFTER
            if quantity == VALIDATION or is_near:
                found[quantity, step, ""] = value
    return found


def second_moments(saved: SavedCheckpoint) -> dict[Key, float]:
    """Mean of Adam's second moments over each tensor, float64; local.

    Empty where the optimizer's state is not stored by tensor: without
    ``--dist-ckpt-optim-fully-reshardable`` the distributed optimizer stores it in buckets.
    """
    state = read_saved_state(Path(saved.folder))
    return {
        (MOMENT, saved.step, weight.key): float(state.source.read(found[0].key).double().mean())
        for weight in state.weights.values()
        if (found := weight.state.get(SECOND_MOMENT))
    }


def _text_losses(step: int, text: dict[str, Any], by_position: bool) -> dict[Key, float]:
    found: dict[Key, float] = {}
    counted = [*zip(text["position_bits"], text["position_tokens"], strict=True)]
    bits, tokens = (math.fsum(column) for column in zip(*counted, strict=True))
    found[TEXT, step, ""] = bits * math.log(2) / tokens
    for position, (bits, tokens) in enumerate(counted if by_position else (), start=1):
        if tokens:
            found[POSITION, step, str(position)] = bits * math.log(2) / tokens
            found[POSITION_TOKENS, step, str(position)] = float(tokens)
    return found
