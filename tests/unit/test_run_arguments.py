"""Runs are compared only where all arguments that can matter are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.commands.compare_runs import main
from megatron_tst.report import arguments as reviewed
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.comparison import match_two, study_of
from megatron_tst.report.describing import describe_settings
from megatron_tst.report.families import families_of, with_differing_arguments
from megatron_tst.report.results import read_result
from megatron_tst.report.results_table import write_results
from megatron_tst.report.sources import read_sources
from megatron_tst.report.wording import cautions
from tests.unit.run_folders import BASELINE, TST, baseline_loss, make_run, tst_loss, write_info

# What Megatron adds to its arguments while it starts, or has under another name in a release.
_DERIVED = {
    *("rank", "world_size", "use_dist_ckpt", "consumed_train_samples"),
    *("iteration", "curr_iteration", "consumed_valid_samples", "start_time", "do_train"),
    *("do_valid", "do_test", "data_parallel_size", "skipped_train_samples", "ckpt_step"),
    *("transformer_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("num_floating_point_operations_so_far", "virtual_pipeline_model_parallel_size"),
}
ARGUMENTS: dict[str, Any] = {
    "moe_router_topk": 2,
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "hybrid_layer_pattern": None,
    "moe_layer_freq": [0, 1],
    "lr_decay_iters": 100,
    "train_iters": 100,
    "save": "/here",
    "tensor_model_parallel_size": 1,
    "log_interval": 1,
    "tst_bag_size": 1,
}


def write_runs(folder: Path, changes: dict[str, Any]) -> list[Path]:
    baseline = make_run(folder / "baseline", BASELINE, baseline_loss)
    write_info(baseline, BASELINE, arguments=ARGUMENTS)
    tst = make_run(folder / "tst", TST, tst_loss)
    write_info(tst, TST, arguments={**ARGUMENTS, "tst_bag_size": 4, **changes})
    return [baseline, tst]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_router_topk": 4}, "moe_router_topk"),
        ({"untie_embeddings_and_output_weights": False}, "untie_embeddings_and_output_weights"),
        ({"hidden_dropout": 0.1}, "hidden_dropout"),
        ({"hybrid_layer_pattern": "*-"}, "hybrid_layer_pattern"),
        ({"moe_layer_freq": [1, 1]}, "moe_layer_freq"),
        ({"lr_decay_iters": 150}, "lr_decay_share"),
        ({"an_argument_of_tomorrow": "new"}, "an_argument_of_tomorrow"),
    ],
)
def test_a_difference_that_can_matter_keeps_runs_apart_and_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write_runs(tmp_path, changes)
    runs = with_differing_arguments([read_result(folder) for folder in folders])
    (family,) = families_of(runs)
    study = study_of(family)
    assert not study.matchups
    assert named in study.alone[0].label
    # Asked for, they are compared, and the difference is named.
    assert match_two(*runs).differences == (named,)
    arms = ["--baseline", str(folders[0]), "--tst", str(folders[1])]
    assert main([*arms, "--output", str(tmp_path / "report.html")]) == 0
    assert named in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"save": "/there", "tensor_model_parallel_size": 2, "log_interval": 10},
        {"an_argument_of_tomorrow": False, "another": None},
        {"train_iters": 200, "lr_decay_iters": 200},
    ],
)
def test_what_cannot_matter_keeps_nothing_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = with_differing_arguments([read_result(f) for f in write_runs(tmp_path, changes)])
    (family,) = families_of(runs)
    assert len(study_of(family).matchups) == 1
    assert match_two(*runs).differences == ()


MACHINE = {"cpu": "a", "accelerator": "CPU", "torch": "2.14.1+cpu", "megatron": "0.19.2"}


@pytest.mark.parametrize("through_tables", [False, True])
@pytest.mark.parametrize(
    ("machine", "arguments", "apart"),
    [
        ({"accelerator": "NVIDIA H200"}, {}, "device (CPU instead of GPU)"),
        ({"torch": "2.13.0"}, {}, "torch (2.14 instead of 2.13)"),
        ({"megatron": "0.20.0"}, {}, "megatron (0.19 instead of 0.20)"),
        ({}, {"fp8": "hybrid", "fp8_recipe": "delayed"}, "fp8 (off instead of hybrid delayed)"),
        ({}, {"fp4": "e2m1"}, "fp4 (off instead of e2m1)"),
        ({}, {"fp16": True}, "fp16 (off instead of on)"),
        # Mended, and the same kernels.
        ({"torch": "2.14.2+cu130", "cpu": "b"}, {}, ""),
    ],
)
def test_runs_of_another_arithmetic_are_not_paired(
    tmp_path: Path,
    machine: dict[str, Any],
    arguments: dict[str, Any],
    apart: str,
    through_tables: bool,
) -> None:
    folders = write_runs(tmp_path, arguments)
    write_info(folders[0], BASELINE, arguments=ARGUMENTS, machine=MACHINE)
    write_info(
        folders[1], TST, arguments={**ARGUMENTS, **arguments}, machine={**MACHINE, **machine}
    )
    runs = [read_result(folder) for folder in folders]
    if through_tables:
        # A table of its own for each run: neither knows what the other has.
        for run in runs:
            write_results(with_differing_arguments([run]), tmp_path / f"{run.name}.csv")
        runs = read_sources([tmp_path / f"{run.name}.csv" for run in runs])
    (family,) = families_of(with_differing_arguments(runs))
    study = study_of(family)
    assert len(study.matchups) == (not apart)
    if apart:
        said = f"the nearest differs in {apart}. What it gains cannot be said."
        assert any(caution.endswith(said) for caution in cautions(study))
        # Both sides are told apart by name, too.
        name, _, values = apart.rstrip(")").partition(" (")
        assert study.alone[0].label.endswith(f"{name} {values.partition(' instead of ')[2]}")


def test_an_arithmetic_that_was_not_recorded_keeps_nothing_apart(tmp_path: Path) -> None:
    folders = write_runs(tmp_path, {})
    write_info(folders[1], TST, arguments=ARGUMENTS, machine=MACHINE)
    (family,) = families_of(with_differing_arguments([read_result(f) for f in folders]))
    assert len(study_of(family).matchups) == 1


def test_the_lists_name_arguments_of_megatron() -> None:
    """A name that is spelled wrongly would let a difference of paths keep runs apart."""
    known = vars(parse_arguments([]))
    assert known.keys() >= reviewed._CANNOT_MATTER - _DERIVED
    assert all(any(name.startswith(prefix) for name in known) for prefix in reviewed._PREFIXES[1:])
    matters = arguments_that_can_matter(known)
    # A sample of what must not be taken for a path or a layout.
    assert {"hidden_dropout", "moe_router_topk", "add_bias_linear", "optimizer"} <= matters.keys()


@pytest.mark.parametrize(
    ("arguments", "layers", "pattern"),
    [
        ({"hybrid_layer_pattern": "*-|*-*-", "num_layers": 6}, 3, None),
        ({"hybrid_layer_pattern": "*E*E", "num_layers": 4, "num_experts": 8}, 2, None),
        # Others than a GPTModel has, or with other layers.
        ({"hybrid_layer_pattern": "*-|--", "num_layers": 4}, 4, "*---"),
        ({"hybrid_layer_pattern": "M-*-", "num_layers": 4}, 4, "M-*-"),
        ({"hybrid_layer_pattern": "*-*-", "num_layers": 4, "num_experts": 8}, 4, "*-*-"),
        ({"hybrid_layer_pattern": "*-*-/*-", "num_layers": 4}, 4, "*-*-/*-"),
        ({"hybrid_layer_pattern": "*E*", "num_layers": 3, "num_experts": 8}, 3, "*E*"),
        ({"hybrid_layer_pattern": None, "num_layers": 4}, 4, None),
    ],
)
def test_a_pattern_that_a_gpt_model_has(
    arguments: dict[str, Any], layers: int, pattern: str | None
) -> None:
    assert describe_settings(arguments)["num_layers"] == layers
    assert arguments_that_can_matter(arguments).get("hybrid_layer_pattern") == pattern
