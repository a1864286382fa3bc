"""Runs of a study that another machine has trained, known by their table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

# What Megatron works out as it starts, from arguments that are compared, or what is no plain value
# and so not recorded. Of all others that a study leaves to Megatron, a difference is told.
_DERIVED = {
    *("_is_global_batch_size_explicitly_specified", "accumulate_allreduce_grads_in_fp32"),
    *("attention_softmax_in_fp32", "dataloader_type", "encoder_seq_length", "end_weight_decay"),
    *("exp_avg_dtype", "exp_avg_sq_dtype", "expert_gtp_weight_remat_size"),
    *("expert_tensor_parallel_num_weight_shards", "gtp_weight_remat_size", "kv_channels"),
    *("main_grads_dtype", "main_params_dtype", "mamba_inference_conv_states_dtype"),
    *("mamba_inference_ssm_states_dtype", "mock_data", "moe_ffn_hidden_size", "skip_train"),
    *("start_weight_decay", "stream_ckpt_dequant", "tensor_parallel_num_weight_shards"),
    *("use_layer_wise_distributed_optimizer", "variable_seq_lengths"),
}
# Megatron sets these from others where the command line does not.
_MAY_BE_SET = {
    *("add_qkv_bias", "apply_wd_to_qk_layernorm", "finetune", "moe_aux_loss_coeff"),
    *("moe_router_load_balancing_type", "multi_latent_attention", "optimizer"),
    *("position_embedding_type", "use_precision_aware_optimizer"),
}
# Flags whose argument is called otherwise.
_NAMES = {"fp8_format": "fp8", "fp4_format": "fp4"}


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
        parse: used where runs recorded their arguments.

    Raises:
        UsageError: naming the file and the run that is not of the study, or what it differs in.
    """
    results = read_results(path)
    runs = {run.name: run for run in study.runs()}
    parsed: dict[str, Mapping[str, Any]] = {}
    untold: set[str] = set()
    for result in results:
        if result.name not in runs:
            raise UsageError(
                f"--earlier {path}: run {result.name} is none of the study: use a table of this "
                "study, or take the run out of it."
            )
        run = runs[result.name]
        different = _different(result, run)
        if result.arguments:
            model = run.settings.model
            if model not in parsed:
                # Runs of a model differ in what the settings tell.
                parsed[model] = parse(_of_megatron(run.arguments))
            refused, left_to_megatron = _otherwise(result, run, parsed[model])
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
        and (_name_of(part) in _GROWING or arguments_that_can_matter({_name_of(part): True}))
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
    different = [
        f"{name} ({found[name]}, not {value})"
        for name, value in asked.items()
        if name in found and found[name] != value
    ]
    size = found.get("global_batch_size")
    if isinstance(size, int) and any(map(arguments.get, _GROWING)):
        different.append(f"global_batch_size ({size}, not one that grows)")
    return different


_GROWING = ("rampup_batch_size", "step_batch_size_schedule")


def _batch_size(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # One that grows is told in the words of its schedule.
    size = arguments.get("global_batch_size")
    return {} if size is None or any(map(arguments.get, _GROWING)) else {"global_batch_size": size}


def _otherwise(
    result: RunResult, run: StudyRun, parsed: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Recorded arguments that are not those of the study: against it, and where it says nothing."""
    # Of a list of one Megatron takes the one.
    asked = arguments_that_can_matter(
        {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in parsed.items()}
    )
    given = set(_by_name(run.arguments))
    against, untold = [], []
    for name in sorted({*asked, *result.arguments} - (_DERIVED - given)):
        was, now = argument_of(result.arguments, name), argument_of(asked, name)
        if was == now:
            continue
        if name in given or (parsed.get(name) is not None and name not in _MAY_BE_SET):
            against.append(f"{name} ({was}, not {now})")
        else:
            untold.append(f"{name} ({was})")
    return against, untold


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
