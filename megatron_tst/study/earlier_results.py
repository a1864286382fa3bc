"""Runs of a study that another machine has trained, known by their table of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import argument_of, arguments_that_can_matter
from megatron_tst.report.describing import (
    OFF,
    describe_data,
    describe_numerics,
    describe_settings,
)
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.study.asked_arguments import AskedArguments, Parser, name_of, names_of
from megatron_tst.study.config import StudyConfig, StudyRun

# What Megatron works out as it starts, from arguments that are compared, or what is no plain value
# and so not recorded. Of all others that a study leaves to Megatron, a difference is told.
_DERIVED = {
    *("_is_global_batch_size_explicitly_specified", "accumulate_allreduce_grads_in_fp32"),
    *("attention_softmax_in_fp32", "dataloader_type", "encoder_seq_length", "exp_avg_dtype"),
    *("exp_avg_sq_dtype", "main_grads_dtype", "main_params_dtype", "mock_data", "skip_train"),
    *("mamba_inference_conv_states_dtype", "mamba_inference_ssm_states_dtype"),
    *("stream_ckpt_dequant", "variable_seq_lengths"),
}
# Megatron sets these from others where the command line does not.
_MAY_BE_SET = {
    *("add_qkv_bias", "apply_wd_to_qk_layernorm", "finetune", "moe_aux_loss_coeff"),
    *("moe_router_load_balancing_type", "multi_latent_attention", "optimizer"),
    *("position_embedding_type", "use_precision_aware_optimizer"),
}
# That they are not in a table says that they are off.
_OFF_WHERE_ABSENT = ("num_experts", "lr_decay_share")
# Where a study leaves these out, its runs have none.
_NEVER_ADDED = (*_OFF_WHERE_ABSENT, "tokenizer_model")
_FORMATS = ("fp8", "fp4")
_GROWING = ("rampup_batch_size", "step_batch_size_schedule")
# A table of an earlier version keeps ten digits.
_PRECISION = 1e-9


@dataclass(frozen=True)
class Earlier:
    """The runs of a table that stand for those of a study.

    Attributes:
        results: the runs that have ended, whose settings are those of the study.
        notes: sentences on what is not used or was not compared.
    """

    results: tuple[RunResult, ...] = ()
    notes: tuple[str, ...] = ()


def read_earlier_results(path: Path, study: StudyConfig, parse: Parser) -> Earlier:
    """Reads a table of ``results.csv``'s kind whose runs are some of a study's.

    Args:
        path: the table.
        study: with the precision that its runs have.
        parse: tells what the study leaves to Megatron.

    Raises:
        UsageError: naming the file and the run that is not of the study, or what it differs in.
    """
    results = read_results(path)
    runs = {run.name: run for run in study.runs()}
    asked = AskedArguments(study, parse)
    untold: set[str] = set()
    for result in results:
        if result.name not in runs:
            raise UsageError(
                f"--earlier {path}: run {result.name} is none of the study: use a table of this "
                "study, or take the run out of it."
            )
        run = runs[result.name]
        arguments = asked.of(run)
        different = _different(result, arguments)
        if result.arguments:
            refused, left_to_megatron = _otherwise(result, arguments, names_of(run.arguments))
            different += refused
            untold |= set(left_to_megatron)
        if different:
            raise UsageError(
                f"--earlier {path}: run {result.name} is of another study, which differs in "
                f"{', '.join(different)}: use a table of this study."
            )
    ended = tuple(result for result in results if result.status != "unfinished")
    notes = [
        _unfinished(len(results) - len(ended)),
        _not_recorded(ended, runs),
        _left_to_megatron(untold),
    ]
    return Earlier(ended, tuple(f"--earlier {path}: {note}" for note in notes if note))


def _unfinished(count: int) -> str:
    return f"{count} of its runs had not ended, and are trained anew." if count else ""


def _not_recorded(results: Sequence[RunResult], runs: Mapping[str, StudyRun]) -> str:
    """What the settings of a table of an earlier version do not tell."""
    silent = [result.name for result in results if not result.arguments]
    if not silent:
        return ""
    asked = {
        f"--{part.removeprefix('--')}"
        for name in silent
        for part in runs[name].arguments
        if part.startswith("--")
        and (name_of(part) in _GROWING or arguments_that_can_matter({name_of(part): True}))
    }
    return (
        f"{len(silent)} of {len(results)} runs did not record all of their arguments. That they "
        f"had those of the study was not checked: {', '.join(sorted(asked))}, and what the study "
        "leaves as Megatron has it."
    )


def _left_to_megatron(names: Iterable[str]) -> str:
    listed = ", ".join(sorted(names))
    return f"runs had {listed}, which the study leaves to Megatron." if listed else ""


def without(study: StudyConfig, names: Iterable[str]) -> StudyConfig:
    """A study without the runs of these names."""
    done = set(names)
    added = study.grid[len(study.grid) - study.controls :]
    return replace(
        study,
        grid=tuple(run for run in study.grid if run.name not in done),
        controls=sum(run.name not in done for run in added),
    )


def in_order_of(study: StudyConfig, results: Sequence[RunResult]) -> list[RunResult]:
    """Results as the runs of the study come, whatever machine they are of."""
    order = {run.name: i for i, run in enumerate(study.runs())}
    return sorted(results, key=lambda result: order[result.name])


def _different(result: RunResult, arguments: Mapping[str, Any]) -> list[str]:
    """What the table tells otherwise than the study asks for, with both values."""
    asked = {
        **describe_settings(arguments),
        **describe_data(arguments),
        **describe_numerics(arguments),
        **_batch_size(arguments),
    }
    found = {**result.settings, **result.data, **result.numerics}
    told = [name for name in asked if name in found or name in _OFF_WHERE_ABSENT]
    told += [name for name in _NEVER_ADDED if name in found and name not in asked]
    pairs = [(name, found.get(name, OFF), asked.get(name, OFF)) for name in told]
    different = [
        f"{name} ({was}, not {now})" for name, was, now in pairs if not _is_same(name, was, now)
    ]
    size = found.get("global_batch_size")
    if isinstance(size, int) and any(map(arguments.get, _GROWING)):
        different.append(f"global_batch_size ({size}, not one that grows)")
    return different


def _is_same(name: str, was: Any, now: Any) -> bool:
    if name in _FORMATS and " " not in was:
        # Without its recipe, as earlier versions wrote it.
        now = now.split()[0]
    if isinstance(was, int | float) and isinstance(now, int | float):
        return isclose(was, now, rel_tol=_PRECISION)
    # No experts may be asked for as 0.
    return (was or OFF) == (now or OFF)


def _batch_size(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # One that grows is told in the words of its schedule.
    size = arguments.get("global_batch_size")
    return {} if size is None or any(map(arguments.get, _GROWING)) else {"global_batch_size": size}


def _otherwise(
    result: RunResult, arguments: Mapping[str, Any], given: set[str]
) -> tuple[list[str], list[str]]:
    """Recorded arguments that are not those of the study: against it, and where it says nothing."""
    # Of a list of one Megatron takes the one.
    asked = arguments_that_can_matter(
        {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in arguments.items()}
    )
    against, untold = [], []
    for name in sorted({*asked, *result.arguments} - (_DERIVED - given)):
        was, now = argument_of(result.arguments, name), argument_of(asked, name)
        if was == now:
            continue
        if name in given or (arguments.get(name) is not None and name not in _MAY_BE_SET):
            against.append(f"{name} ({was}, not {now})")
        else:
            untold.append(f"{name} ({was})")
    return against, untold
