"""Runs are compared only where all arguments that can matter are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.commands.compare_runs import main
from megatron_tst.common.errors import UsageError
from megatron_tst.report import arguments as reviewed
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.cautions import cautions
from megatron_tst.report.compared_settings import decay_share
from megatron_tst.report.comparison import Study, match_two, study_of
from megatron_tst.report.describing import NUMERICS, describe_settings
from megatron_tst.report.families import families_of, with_differing_arguments
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import write_results
from megatron_tst.report.sources import read_sources
from tests import results_page
from tests.unit.run_folders import BASELINE, TST, baseline_loss, make_run, tst_loss, write_info
from tests.unit.synthetic_runs import line, synthetic_run

# What Megatron adds to its arguments while it starts, or has under another name in a release.
_DERIVED = {
    *("rank", "world_size", "use_dist_ckpt", "consumed_train_samples"),
    *("iteration", "curr_iteration", "consumed_valid_samples", "start_time", "do_train"),
    *("do_valid", "do_test", "data_parallel_size", "skipped_train_samples", "ckpt_step"),
    *("transformer_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("num_floating_point_operations_so_far", "virtual_pipeline_model_parallel_size"),
    *("gtp_weight_remat_size", "expert_gtp_weight_remat_size", "use_custom_fsdp"),
    "use_layer_wise_distributed_optimizer",
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
        # What Megatron makes of a layout.
        {"tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_num_weight_shards": 2},
        {"use_megatron_fsdp": True, "use_custom_fsdp": True},
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


def arm(seeds: range, bag_size: int, arguments: dict[str, Any], **settings: Any) -> list[RunResult]:
    runs = [synthetic_run(line(3.0), bag_size=bag_size, seed=seed, **settings) for seed in seeds]
    numerics = dict.fromkeys(NUMERICS, "same")
    return [replace(run, arguments=arguments, numerics=numerics) for run in runs]


def through_tables(folder: Path, *arms: list[RunResult]) -> list[RunResult]:
    """Each arm by a table of its own: none knows what the others have."""
    paths = [folder / f"{i}.csv" for i in range(len(arms))]
    for path, runs in zip(paths, arms, strict=True):
        write_results(with_differing_arguments(runs), path)
    return read_sources(paths)


def compared(runs: list[RunResult]) -> Study:
    (family,) = families_of(runs)
    return study_of(family)


DROPOUT = {"hidden_dropout": 0.1, "moe_router_topk": 1}


@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ({"hidden_dropout": 0.0, "moe_router_topk": 2}, 0),
        ({"hidden_dropout": 0.0, "moe_router_topk": 1}, 0),
        # Off, as in a release that has no such argument.
        ({**DROPOUT, "another": False}, 3),
    ],
)
def test_a_difference_outlives_tables(
    tmp_path: Path, tables: int, arguments: dict[str, Any], pairs: int
) -> None:
    arms = [arm(range(3), 1, DROPOUT), arm(range(3), 2, arguments)]
    read = through_tables(tmp_path, *arms[:tables]) if tables else []
    study = compared([*read, *(run for one in arms[tables:] for run in one)])
    assert sum(len(matchup.pairs) for matchup in study.matchups) == pairs
    assert not any("did not record" in caution for caution in cautions(study))
    if not pairs:
        assert "hidden_dropout off" in study.alone[0].label


def test_a_part_of_a_table_pairs_with_runs_that_have_its_argument(tmp_path: Path) -> None:
    """The table has a column for what its runs differed in, and those that did are left out."""
    arms = [arm(range(3), 1, {**DROPOUT, "hidden_dropout": 0.0}), arm(range(3), 2, DROPOUT)]
    write_results(with_differing_arguments([*arms[0], *arms[1]]), tmp_path / "all.csv")
    rest = [run for run in read_sources([tmp_path / "all.csv"]) if run.bag_size == 2]
    assert rest[0].settings["hidden_dropout"] == 0.1
    for dropout, pairs in ((0.1, 3), (0, 0)):
        study = compared([*rest, *arm(range(3), 1, {**DROPOUT, "hidden_dropout": dropout})])
        assert sum(len(matchup.pairs) for matchup in study.matchups) == pairs


def test_what_is_stated_of_a_run_outlives_a_table(tmp_path: Path) -> None:
    (run,) = arm(range(1), 1, DROPOUT)
    stated = replace(run, settings={**run.settings, "hidden_dropout": 0})
    (again,) = through_tables(tmp_path, [stated])
    assert with_differing_arguments([again])[0].settings["hidden_dropout"] == "off"


def test_runs_of_another_model_split_no_arm_of_runs_that_recorded_nothing() -> None:
    """New runs of a table may have a model of their own, whose arguments the old ones lack."""
    old = [*arm(range(3), 1, {}), *arm(range(3), 2, {})]
    new = [*arm(range(3, 5), 1, DROPOUT), *arm(range(3, 5), 2, DROPOUT)]
    other = synthetic_run(line(3.0), name="other", hidden_size=16)
    experts = replace(other, arguments={**DROPOUT, "moe_router_topk": 2})
    families = families_of([*old, *new, experts])
    (matchup,) = study_of(families[0]).matchups
    assert len(matchup.pairs) == 5


@pytest.mark.parametrize(
    ("recorded", "said"),
    [((True, True), False), ((False, True), True), ((False, False), True)],
)
def test_what_was_not_recorded_is_said_once(
    tmp_path: Path, recorded: tuple[bool, bool], said: bool
) -> None:
    arms = [
        arm(range(3), size, DROPOUT if was else {})
        for size, was in zip((1, 2), recorded, strict=True)
    ]
    runs = through_tables(tmp_path, *arms)
    found = [one for one in cautions(compared(runs)) if "did not record" in one]
    assert len(found) == said
    if said:
        lacking = 3 * recorded.count(False)
        assert found[0].startswith(f"{lacking} of 6 runs (baseline-100-seed0, ")
        assert "did not record: arguments beyond the settings. That" in found[0]
        # And so it is where they are written into one table.
        write_results(with_differing_arguments(runs), tmp_path / "joined.csv")
        assert found[0] in cautions(compared(read_sources([tmp_path / "joined.csv"])))


def test_runs_of_one_table_of_an_earlier_version_were_compared(tmp_path: Path) -> None:
    write_results([*arm(range(3), 1, {}), *arm(range(3), 2, {})], tmp_path / "old.csv")
    assert "arguments" not in (tmp_path / "old.csv").read_text().splitlines()[0]
    study = compared(read_sources([tmp_path / "old.csv"]))
    assert not any("did not record" in caution for caution in cautions(study))


def test_arguments_that_are_no_json_are_refused(tmp_path: Path) -> None:
    write_results(arm(range(1), 1, DROPOUT), tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace('"{""hidden_dropout', '"[""hidden_dropout'))
    with pytest.raises(UsageError, match="seed0 has arguments that are no JSON object"):
        read_sources([tmp_path / "a.csv"])


def test_the_page_of_results_pairs_no_runs_of_another_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        replace(run, numerics={"device": device})
        for size, device in ((1, "CPU"), (2, "GPU"))
        for run in arm(range(3), size, {})
    ]
    write_results(runs, tmp_path / "small.csv")
    monkeypatch.setattr(results_page, "TABLES", tmp_path)
    monkeypatch.setitem(results_page.SECTIONS, "small", ("small", 1000))
    assert not results_page.study("small").matchups


@pytest.mark.parametrize(
    "name",
    ["lr_warmup_samples", "lr_wsd_decay_samples", "phase_transition_iterations", "no_load_optim"],
)
def test_arguments_that_were_taken_for_harmless(name: str) -> None:
    assert arguments_that_can_matter({name: 5}) == {name: 5}
    arms = [arm(range(3), 1, {**DROPOUT, name: 5}), arm(range(3), 2, {**DROPOUT, name: 10})]
    study = compared([*arms[0], *arms[1]])
    assert not study.matchups
    assert any(f"differs in {name} (5 instead of 10)" in caution for caution in cautions(study))


def test_a_longer_baseline_may_have_a_longer_warm_up_in_samples() -> None:
    tst = arm(range(3), 2, {"lr_warmup_samples": 5})
    same = arm(range(3), 1, {"lr_warmup_samples": 5})
    longer = [
        replace(
            synthetic_run(line(2.9, 200), total_steps=200, seed=seed),
            arguments={"lr_warmup_samples": 10},
        )
        for seed in range(3)
    ]
    (matchup,) = compared([*tst, *same, *longer]).matchups
    assert len(matchup.baselines) == 2


def test_a_decay_in_samples_and_no_decay_are_read_side_by_side(tmp_path: Path) -> None:
    runs = [
        run
        for size in (1, 2)
        for style, arguments in (("WSD", {"lr_wsd_decay_samples": 80}), ("cosine", DROPOUT))
        for run in arm(
            range(3), size, {**DROPOUT, **arguments}, lr_decay_style=style, global_batch_size=8
        )
    ]
    table = tmp_path / "runs.csv"
    write_results(with_differing_arguments(runs), table)
    assert "off" in {run.settings["lr_wsd_decay_samples"] for run in read_sources([table])}
    for read in (runs, read_sources([table])):
        study = compared(read)
        assert [len(matchup.pairs) for matchup in study.matchups] == [3, 3]
        shares = [decay_share(matchup.tst.settings) for matchup in study.matchups]
        assert sorted(map(str, shares)) == ["0.1", "None"]


def test_a_weight_decay_that_suits_the_baseline_better_is_seen() -> None:
    def with_decay(value: float, loss: float, bag_size: int = 1) -> list[RunResult]:
        # Megatron sets the two from the first.
        recorded = {"start_weight_decay": value, "end_weight_decay": value, **DROPOUT}
        return [
            replace(
                synthetic_run(line(loss), bag_size=bag_size, seed=seed, weight_decay=value),
                arguments=arguments_that_can_matter(recorded),
            )
            for seed in range(3)
        ]

    runs = [*with_decay(0.1, 3.0), *with_decay(0.2, 2.5), *with_decay(0.1, 2.9, bag_size=2)]
    study = compared(runs)
    assert len(study.matchups) == 1
    assert any("weight_decay 0.2 (3 seeds) ended lower" in caution for caution in cautions(study))


def test_a_weight_decay_that_grows_is_an_argument() -> None:
    grown: dict[str, Any] = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0}
    assert arguments_that_can_matter(grown) == grown


def test_a_table_of_an_earlier_version_holds_what_does_not_matter(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    kept: dict[str, Any] = {
        **DROPOUT,
        "tensor_parallel_num_weight_shards": 2,
        "start_weight_decay": 0.1,
    }
    write_results([replace(run, arguments=kept) for run in arm(range(1), 1, {})], table)
    (run,) = read_sources([table])
    assert run.arguments == DROPOUT


def test_a_start_from_weights_has_no_optimizer_to_load() -> None:
    assert arguments_that_can_matter({"finetune": True, "no_load_optim": True}) == {
        "finetune": True
    }


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
