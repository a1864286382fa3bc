"""Runs of a study that another machine has trained, known by their table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import argument_of, arguments_that_can_matter
from megatron_tst.report.describing import describe_data, describe_numerics, describe_settings
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.study.config import StudyConfig, StudyRun

Parser = Callable[[Sequence[str]], Mapping[str, Any]]
"""Megatron's own: from a command line to all arguments by name."""

# Where they are not on the command line, Megatron sets these from others as it starts, or they are
# no plain values and so not recorded.
_SET_BY_MEGATRON = {
    *("accumulate_allreduce_grads_in_fp32", "add_qkv_bias", "apply_wd_to_qk_layernorm"),
    *("attention_softmax_in_fp32", "exp_avg_dtype", "exp_avg_sq_dtype", "finetune"),
    *("main_grads_dtype", "main_params_dtype", "mamba_inference_conv_states_dtype"),
    *("mamba_inference_ssm_states_dtype", "mock_data", "moe_aux_loss_coeff"),
    *("moe_router_load_balancing_type", "multi_latent_attention", "optimizer"),
    *("position_embedding_type", "skip_train", "stream_ckpt_dequant"),
    "use_precision_aware_optimizer",
}
# Flags whose argument is called otherwise.
_NAMES = {"fp8_format": "fp8", "fp4_format": "fp4"}


def read_earlier_results(path: Path, study: StudyConfig, parse: Parser) -> list[RunResult]:
    """Reads a table of ``results.csv``'s kind whose runs are some of a study's.

    Args:
        path: the table.
        study: with the precision that its runs have.
        parse: used where runs recorded their arguments.

    Raises:
        UsageError: naming the file and the run that is not of the study, or what it differs in.
    """
    results = read_results(path)
    runs = {run.name: run for run in study.runs()}
    parsed: dict[str, Mapping[str, Any]] = {}
    for result in results:
        if result.name not in runs:
            raise UsageError(
                f"--earlier {path}: run {result.name} is none of the study: use a table of this "
                "study, or take the run out of it."
            )
        run = runs[result.name]
        model = run.settings.model
        if result.arguments and model not in parsed:
            # Runs of a model differ in what the settings tell.
            parsed[model] = parse(_of_megatron(run.arguments))
        different = _different(result, run)
        if result.arguments:
            different += _otherwise(result, run, parsed[model])
        if different:
            raise UsageError(
                f"--earlier {path}: run {result.name} is of another study, which differs in "
                f"{', '.join(different)}: use a table of this study."
            )
    return results


def not_compared(path: Path, study: StudyConfig, results: Sequence[RunResult]) -> str:
    """What of a study the runs of a table do not tell, as a sentence; empty if they tell all.

    Args:
        path: of the table.
        study: of its runs.
        results: what :func:`read_earlier_results` found there.
    """
    silent = {result.name for result in results if not result.arguments}
    asked = {
        f"--{part.removeprefix('--')}"
        for run in study.runs()
        if run.name in silent
        for part in run.arguments
        if part.startswith("--") and arguments_that_can_matter({_name_of(part): True})
    }
    if not silent:
        return ""
    return (
        f"--earlier {path}: {len(silent)} of {len(results)} runs did not record all of their "
        f"arguments. That they had those of the study was not checked: {', '.join(sorted(asked))}, "
        "and what the study leaves as Megatron has it."
    )


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


def _different(result: RunResult, run: StudyRun) -> list[str]:
    """What the table has otherwise than the study asks for, with both values."""
    arguments = {"bf16": False, **_by_name(run.arguments)}
    asked = {
        **describe_settings(arguments),
        **describe_data(arguments),
        **describe_numerics(arguments),
        **_batch_size(arguments),
    }
    found = {**result.settings, **result.data, **result.numerics}
    return [
        f"{name} ({found[name]}, not {value})"
        for name, value in asked.items()
        if name in found and found[name] != value
    ]


def _batch_size(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # One that grows is told in the words of its schedule.
    grows = arguments.get("rampup_batch_size") or arguments.get("step_batch_size_schedule")
    size = arguments.get("global_batch_size")
    return {} if grows or size is None else {"global_batch_size": size}


def _otherwise(result: RunResult, run: StudyRun, parsed: Mapping[str, Any]) -> list[str]:
    """Recorded arguments that are not those of the study, with both values."""
    # Of a list of one Megatron takes the one.
    asked = arguments_that_can_matter(
        {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in parsed.items()}
    )
    given = set(_by_name(run.arguments))
    # What is None Megatron works out from others.
    names = {name for name in (*asked, *result.arguments) if parsed.get(name) is not None}
    pairs = {
        name: (argument_of(result.arguments, name), argument_of(asked, name))
        for name in sorted(names - (_SET_BY_MEGATRON - given))
    }
    return [f"{name} ({was}, not {now})" for name, (was, now) in pairs.items() if was != now]


def _of_megatron(arguments: Sequence[str]) -> list[str]:
    """Without the flags of superposition, each with its value."""
    found: list[str] = []
    is_kept = True
    for part in arguments:
        is_kept = not part.startswith("--tst-") if part.startswith("--") else is_kept
        found += [part] if is_kept else []
    return found


def _name_of(flag: str) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    return _NAMES.get(name, name)


def _by_name(arguments: Sequence[str]) -> dict[str, Any]:
    """``["--lr", "0.1", "--bf16"]`` as ``{"lr": 0.1, "bf16": True}``."""
    found: dict[str, Any] = {}
    name = ""
    for part in arguments:
        if part.startswith("--"):
            name = _name_of(part)
            found[name] = True
        elif found[name] is True:
            found[name] = _value(part)
        else:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*before, _value(part)]
    return found


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
