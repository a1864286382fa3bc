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
from megatron_tst.report.families import families_of, with_differing_arguments
from megatron_tst.report.results import read_result
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


def test_the_lists_name_arguments_of_megatron() -> None:
    """A name that is spelled wrongly would let a difference of paths keep runs apart."""
    known = vars(parse_arguments([]))
    assert known.keys() >= reviewed._CANNOT_MATTER - _DERIVED
    assert all(any(name.startswith(prefix) for name in known) for prefix in reviewed._PREFIXES[1:])
    matters = arguments_that_can_matter(known)
    # A sample of what must not be taken for a path or a layout.
    assert {"hidden_dropout", "moe_router_topk", "add_bias_linear", "optimizer"} <= matters.keys()
