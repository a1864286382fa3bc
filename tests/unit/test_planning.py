"""The planner against the published runs, and what holds for every request."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.commands.plan_run import main, parse_arguments, read_request
from megatron_tst.data.budget import TrainText, refuse_repetition
from megatron_tst.planning.accounting import Cluster, ModelSize, parse_tokens
from megatron_tst.planning.advisor import Plan, make_plan
from megatron_tst.planning.arms import Arm, Request
from megatron_tst.planning.check import Prediction, published_tokens_per_second
from megatron_tst.planning.limits import warnings
from megatron_tst.planning.loss_estimate import (
    SCATTER,
    Estimate,
    LossModel,
    loss_model,
)
from megatron_tst.planning.published import (
    PUBLISHED_MODELS,
    PublishedRun,
    grid_600m,
    published_grids,
    published_runs,
)
from megatron_tst.planning.wording import controls, launch_flags, plan_as_json
from megatron_tst.settings.arguments import add_superposition_arguments
from tests.corpus import write_corpus

MODELS = st.sampled_from(list(PUBLISHED_MODELS))
SIZES = st.one_of(
    MODELS.map(lambda name: PUBLISHED_MODELS[name].size),
    st.floats(5e7, 1e11).map(lambda n: ModelSize("own", int(n), int(n))),
    st.floats(1e9, 1e12).map(lambda n: ModelSize("own", int(n), int(n / 8))),
)
AMPLE = 1e18


def request(model: str = "270M", gpu_hours: float = 34, tokens: float = AMPLE) -> Request:
    published = PUBLISHED_MODELS[model]
    return Request(
        size=published.size,
        cluster=Cluster(8, published_tokens_per_second(model)),
        gpu_hours=gpu_hours,
        tokens=tokens,
        max_epochs=1.0,
        global_batch_size=published.batch_tokens // published.sequence_length,
        sequence_length=published.sequence_length,
    )


def of_size(size: ModelSize, steps: float, tokens: float, max_epochs: float = 1.0) -> Request:
    """A budget of this many steps, on one GPU."""
    reference = loss_model(size).reference
    sequences = reference.batch_tokens // 4096
    hours = Cluster(1, 1e5).gpu_hours(steps * reference.batch_tokens)
    return Request(size, Cluster(1, 1e5), hours, tokens, max_epochs, sequences, 4096)


def is_superposed_input(arm: Arm) -> bool:
    return arm.schedule.config.superposes_input


@pytest.mark.parametrize("run", published_runs(), ids=str)
def test_published_runs(run: PublishedRun) -> None:
    prediction = Prediction(run)
    assert prediction.data_tokens == pytest.approx(run.data_tokens, rel=0.01)
    assert prediction.gpu_hours == pytest.approx(run.gpu_hours, rel=0.1)
    # The grid and the final run of the 600M model differ by 0.0009.
    assert prediction.loss.value == pytest.approx(run.final_loss, abs=1e-3)
    assert prediction.loss.low <= run.final_loss <= prediction.loss.high
    assert not prediction.loss.outside


def test_every_cell_of_the_grids_is_reproduced() -> None:
    for name in ("270M", "600M"):
        model = loss_model(PUBLISHED_MODELS[name].size)
        for grid in published_grids(name):
            for ratio, row in zip(grid.ratios, grid.losses, strict=True):
                for bag_size, loss in enumerate(row, start=1):
                    found = model.superposed(grid.equivalent_tokens, bag_size, float(ratio))
                    # The shorter 270M grid has larger bag sizes than the longer one.
                    assert found.value == pytest.approx(loss, abs=1e-9)


def test_grid_of_the_600m_model_takes_the_default_weights_of_each_bag_size() -> None:
    # Cells r=0.3 of loss_600m_20k_steps_{uniform,power_law}.csv.
    assert grid_600m().losses[3, 7 - 1] == 2.9445
    assert grid_600m().losses[3, 8 - 1] == 2.9445
    assert grid_600m().losses[3, 13 - 1] == 2.9471


def test_scatter_is_that_of_the_grids() -> None:
    largest = max(
        abs(row[i] - (row[i - 1] + row[i + 1]) / 2)
        for name in ("270M", "600M")
        for grid in published_grids(name)
        for row in grid.losses[2:5]
        for i in range(4, len(row) - 1)
    )
    assert largest == pytest.approx(SCATTER, abs=5e-4)


def test_a_run_left_out_lies_in_the_range_of_its_estimate() -> None:
    whole = loss_model(PUBLISHED_MODELS["3B"].size)
    without = replace(whole, tokens=whole.tokens[[0, 2]], losses=whole.losses[[0, 2]])
    estimate = without.baseline(float(whole.tokens[1]))
    assert estimate.low <= whole.losses[1] <= estimate.high


@pytest.mark.parametrize(
    ("model", "tokens", "bag_size", "step_ratio"),
    [
        ("270M", 20e9, 6, 0.3),
        ("270M", 500e9, 6, 0.3),
        ("270M", 42e9, 20, 0.3),
        ("3B", 20_000 * 2**21, 5, 0.3),
        ("3B", 100e9, 6, 0.3),
        ("10B-A1B", 2e12, 16, 0.25),
    ],
)
def test_extrapolations_are_marked_and_less_certain(
    model: str, tokens: float, bag_size: int, step_ratio: float
) -> None:
    estimate = loss_model(PUBLISHED_MODELS[model].size).superposed(tokens, bag_size, step_ratio)
    assert estimate.outside
    assert estimate.high - estimate.low > 3 * 2 * SCATTER


@pytest.mark.parametrize(
    ("model", "hours", "bag_sizes", "ratios"),
    [
        ("270M", 34, (3, 8), (0.2, 0.4)),
        ("270M", 170, (3, 8), (0.2, 0.4)),
        ("600M", 61, (6, 10), (0.2, 0.4)),
        ("3B", 247, (6, 6), (0.3, 0.3)),
        ("10B-A1B", 4768, (16, 16), (0.25, 0.25)),
    ],
)
def test_recommends_the_published_best(
    model: str, hours: float, bag_sizes: tuple[int, int], ratios: tuple[float, float]
) -> None:
    plan = make_plan(request(model, hours))
    config = plan.recommended.schedule.config
    assert plan.limit == "compute-bound"
    assert bag_sizes[0] <= config.bag_size <= bag_sizes[1]
    assert config.step_ratio is not None
    assert ratios[0] <= config.step_ratio <= ratios[1]


def test_equal_loss_of_the_3b_model_is_the_published_baseline() -> None:
    plan = make_plan(request("3B", 247))
    flops, of_tst, of_baseline, data = plan.comparisons
    # Published: 36,000 steps reach 2.677, and TST in 20,000 reaches 2.676.
    assert of_tst.baseline is not None
    assert of_tst.baseline.steps == pytest.approx(36_000, rel=0.02)
    assert flops.baseline is not None
    assert of_baseline.baseline is not None
    assert of_baseline.tst is not None
    assert of_baseline.tst.loss.value == pytest.approx(flops.baseline.loss.value, abs=1e-4)
    assert of_baseline.tst.gpu_hours < of_baseline.baseline.gpu_hours
    # Published: at equal data, 50,000 steps, the baseline wins with 2.640.
    assert data.baseline is not None
    assert data.tst is not None
    assert data.baseline.steps == 50_000
    assert data.baseline.loss.value < data.tst.loss.value


def test_flops_per_token() -> None:
    # By hand: 6 * 1e9, and 2 layers of width 10 at length 100: 6 * 2 * 10 * 100.
    assert ModelSize("own", 10**9, 10**9, 2, 10).flops_per_token(100) == 6e9 + 12_000
    # A window as wide as the sequence is none.
    windows = ModelSize("own", 10**9, 10**9, 0, 10, (100, 200))
    assert windows.flops_per_token(100) == 6e9 + 12_000
    narrow = ModelSize("own", 10**9, 10**9, 0, 10, (4,))
    assert narrow.flops_per_token(100) == 6e9 + 120 * (4 - 16 / 200)


@settings(max_examples=30, deadline=None)
@given(
    size=SIZES,
    steps=st.floats(1001, 1e6),
    share=st.floats(0.0, 1.19),
    epochs=st.floats(1, 50),
)
def test_never_superposes_input_where_text_is_the_limit(
    size: ModelSize, steps: float, share: float, epochs: float
) -> None:
    batch = loss_model(size).reference.batch_tokens
    text = max(share * math.floor(steps), 1000) * batch
    if text >= 1.2 * math.floor(steps) * batch:
        return
    plan = make_plan(of_size(size, steps, text, epochs))
    assert plan.limit == "data-bound"
    assert not plan.recommended.schedule.config.enabled
    assert not any(is_superposed_input(arm) for _, arm in plan.alternatives)
    assert any(arm.schedule.config.variant == "output-only" for _, arm in plan.alternatives)
    assert plan.recommended.fits_text
    assert all(
        comparison.tst is None or comparison.tst.fits_text for comparison in plan.comparisons
    )


@settings(max_examples=30, deadline=None)
@given(size=SIZES, steps=st.floats(1001, 1e6), factor=st.floats(1, 20))
def test_more_budget_is_never_worse_with_ample_text(
    size: ModelSize, steps: float, factor: float
) -> None:
    less, more = (make_plan(of_size(size, n, AMPLE)).recommended for n in (steps, factor * steps))
    assert more.loss.value <= less.loss.value
    assert more.data_tokens >= less.data_tokens or more.steps >= less.steps


@settings(max_examples=30, deadline=None)
@given(size=SIZES, steps=st.floats(1001, 1e6), share=st.floats(0.5, 10), factor=st.floats(1, 20))
def test_more_text_is_never_worse(
    size: ModelSize, steps: float, share: float, factor: float
) -> None:
    text = max(share * steps, 1000) * loss_model(size).reference.batch_tokens
    less, more = (make_plan(of_size(size, steps, n)) for n in (text, factor * text))
    assert more.recommended.loss.value <= less.recommended.loss.value
    assert more.recommended.data_tokens >= less.recommended.data_tokens
    assert more.recommended.steps >= less.recommended.steps
    assert (less.limit, more.limit) != ("compute-bound", "data-bound")


@settings(max_examples=100, deadline=None)
@given(
    size=SIZES,
    tokens=st.floats(1e8, 1e14),
    factor=st.floats(1, 100),
    bag_size=st.integers(2, 32),
    step_ratio=st.floats(0.01, 0.9),
)
def test_longer_runs_are_never_worse(
    size: ModelSize, tokens: float, factor: float, bag_size: int, step_ratio: float
) -> None:
    model: LossModel = loss_model(size)
    short, long = tokens, tokens * factor
    for at in (model.baseline, lambda n: model.superposed(n, bag_size, step_ratio)):
        worse, better = at(short), at(long)
        assert better.value <= worse.value + 1e-12
        assert all(estimate.low < estimate.value < estimate.high for estimate in (worse, better))


def test_a_given_setting_that_the_text_does_not_suffice_for() -> None:
    plan = make_plan(replace(request(tokens=80e9), bag_size=16, step_ratio=0.4))
    assert plan.limit == "data-bound"
    assert "lower s or r" in plan.reason
    assert not plan.recommended.schedule.config.enabled


def test_a_given_setting_that_does_not_gain() -> None:
    plan = make_plan(replace(request(), bag_size=16, step_ratio=0.9))
    assert plan.limit == "compute-bound"
    assert not plan.recommended.schedule.config.enabled


def test_offers_less_text_only_where_settings_were_compared() -> None:
    (name, arm), *_ = make_plan(request("270M", 170)).alternatives
    assert "fewer tokens" in name
    assert arm.data_tokens < make_plan(request("270M", 170)).recommended.data_tokens
    assert make_plan(request("3B", 247)).alternatives == ()


def warned(plan: Plan) -> str:
    return "\n".join(warnings(plan))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step_ratio": 0.1}, "--tst-step-ratio 0.1 is outside"),
        ({"step_ratio": 0.5}, "--tst-step-ratio 0.5 is outside"),
        ({"bag_size": 12}, "--tst-bag-size 12: 3 to 8 is the best at 270M"),
        ({"bag_size": 16, "step_ratio": 0.4}, "s * r is large: the run reads 7.0 times"),
        ({"gpu_hours": 10}, "A short run"),
        ({"gpu_hours": 8}, "Phase 2 has"),
        ({"gpu_hours": 2}, "equivalent tokens a parameter"),
        ({"tokens": 60e9}, "The tokens limit s and r"),
        ({"tokens": 60e9, "max_epochs": 2.0}, "The tokens are read"),
        ({"tokens": 10e9}, "The tokens end before the budget: 26 GPU-hours"),
        ({"tokens": 5e9, "max_epochs": 8.0}, "Beyond 4 epochs"),
        ({"global_batch_size": 64}, "A step has 262 k tokens"),
        ({"size": ModelSize("1B", 10**9, 10**9)}, "tune it for 1B"),
        (
            {"loss_impl": "host"},
            "--tst-loss-impl host: phase 2 and baselines have Megatron's loss and bags triton",
        ),
    ],
)
def test_warnings(changes: dict[str, object], words: str) -> None:
    assert words in warned(make_plan(replace(request(), **changes)))  # type: ignore[arg-type]


def test_the_published_setting_is_not_warned_about() -> None:
    assert warned(make_plan(request("3B", 247))) == ""


def test_launch_flags() -> None:
    plan = make_plan(replace(request("3B", 247), bag_size=6, step_ratio=0.3))
    assert " ".join(launch_flags(plan, plan.recommended)) == (
        "--seq-length 4096 --global-batch-size 512 --train-iters 20000 "
        "--lr 0.0002 --min-lr 0 --lr-warmup-iters 2000 "
        "--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 2000 "
        "--split 1,0,0 --tst-bag-size 6 --tst-steps 6000"
    )


def test_a_control_of_every_length_that_is_compared() -> None:
    plan = make_plan(replace(request("3B", 247), bag_size=6, step_ratio=0.3))
    found = {name: arm.steps for name, arm in controls(plan)}
    longer = found.pop("equal loss: that of TST")
    assert found == {"equal FLOPs": 20_000, "equal data": 50_000}
    assert 20_000 < longer < 50_000
    for _, arm in controls(plan):
        flags = " ".join(launch_flags(plan, arm))
        assert f"--train-iters {arm.steps} " in flags
        assert f"--lr-wsd-decay-iters {arm.steps // 10} " in flags
        assert flags.endswith("--tst-bag-size 1")


def test_launch_flags_allow_the_epochs_of_the_plan() -> None:
    plan = make_plan(replace(request(tokens=60e9), max_epochs=4.0))
    flags = launch_flags(plan, plan.recommended)[-1].split()
    allowed = float(flags[flags.index("--tst-max-epochs") + 1])
    assert plan.recommended.epochs <= allowed < plan.recommended.epochs * 1.011


def test_cost_and_days() -> None:
    plan = make_plan(replace(request(), cluster=replace(request().cluster, price_per_gpu_hour=5)))
    assert plan.recommended.cost == pytest.approx(34 * 5)
    assert plan.recommended.days == pytest.approx(34 / 8 / 24)


@settings(max_examples=20, deadline=None)
@given(size=SIZES, steps=st.floats(1001, 1e6), share=st.floats(0.5, 10))
def test_json_holds_plain_finite_numbers(size: ModelSize, steps: float, share: float) -> None:
    text = max(share * steps, 1000) * loss_model(size).reference.batch_tokens
    content = plan_as_json(make_plan(of_size(size, steps, text)))
    assert json.loads(json.dumps(content, allow_nan=False)) == content


GOOD = ("--model", "3B", "--gpu-hours", "247", "--tokens", "300B")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*GOOD, "--price-per-gpu-hour", "4", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert list(tmp_path.iterdir()) == [file]
    assert plan["recommended"]["data_tokens"] == 20_000 * 2**21 * 2.5
    assert plan["recommended"]["cost"] == pytest.approx(988)
    for text in ("compute-bound", "equal FLOPs", "equal loss", "equal data", *plan["flags"]):
        assert text in shown


@pytest.mark.parametrize("split", ["9995,5,0", "969,30,1", "12345678,50000"])
@pytest.mark.parametrize("epochs", ["1", "1.5"])
def test_the_program_takes_the_run_for_which_the_tokens_suffice(
    tmp_path: Path, split: str, epochs: str
) -> None:
    """With the train split of a real corpus, which is one of documents."""
    lengths = np.random.default_rng(1).integers(20, 400, 300)
    write_corpus(tmp_path / "text", lengths.tolist())
    size = ["--parameters", "1M", "--tokens-per-second-per-gpu", "1e6", "--gpu-hours", "1e-4"]
    batch = ["--gpus", "1", "--global-batch-size", "1", "--seq-length", "16", "--split", split]
    text = ["--tokens", str(lengths.sum()), "--max-epochs", epochs]
    plan = make_plan(read_request(parse_arguments([*size, *batch, *text])))
    assert plan.limit == "data-bound"
    assert plan.tst.epochs > 0.99 * float(epochs)
    flags = " ".join(launch_flags(plan, plan.tst)).split()
    assert flags[flags.index("--split") + 1] == split
    args, _ = add_superposition_arguments(ArgumentParser()).parse_known_args(flags)
    shares = [float(share) for share in split.split(",")]
    train = TrainText(str(tmp_path / "text"), shares[0] / sum(shares))
    refuse_repetition(plan.tst.schedule, [train], [1.0], args.tst_max_epochs)


def test_several_bag_sizes_beside_the_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main([*GOOD, "--tst-schedule", "8:0.05,4:0.1,2:0.15", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| instead: the sizes asked for +\| s=8,4,2, r=0.3 ", shown)
    assert "--tst-schedule 8:1000,4:2000,2:3000" in shown
    assert "no loss of a run with several bag sizes is published" in shown
    plan = json.loads(file.read_text(encoding="utf-8"))
    (found,) = (arm for arm in plan["alternatives"] if len(arm["bags"]) > 1)
    assert found["bags"] == [[8, 1000], [4, 2000], [2, 3000]]
    assert found["steps"] == plan["recommended"]["steps"] == 20_000
    assert found["data_tokens"] == 2**21 * (8 * 1000 + 4 * 2000 + 2 * 3000 + 14_000)
    assert found["gpu_hours"] == plan["recommended"]["gpu_hours"]
    sizes = [
        loss_model(PUBLISHED_MODELS["3B"].size).superposed(20_000 * 2**21, size, 0.3)
        for size in (8, 4, 2)
    ]
    assert found["loss"]["low"] == min(size.low for size in sizes)
    assert min(s.value for s in sizes) < found["loss"]["value"] < max(s.value for s in sizes)


def test_drawn_bag_sizes_beside_the_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main([*GOOD, "--tst-bag-sizes", "4:1,2:3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "--tst-bag-sizes 2:3,4:1 --tst-steps 6000" in shown
    plan = json.loads(file.read_text(encoding="utf-8"))
    (found,) = (arm for arm in plan["alternatives"] if arm["bag_sizes"])
    config = SuperpositionConfig(bag_sizes="2:3,4:1", steps=6000)
    batch = BatchSizes.constant(2**21 // 4096)
    schedule = SuperpositionSchedule(config, 20_000, batch, 4096)
    assert found["data_tokens"] == schedule.data_tokens(20_000)
    # 2.5 tokens a position, give or take what 6000 draws may.
    assert found["data_tokens"] / 2**21 == pytest.approx(6000 * 2.5 + 14_000, abs=300)


@pytest.mark.parametrize(
    ("loss_impl", "bags", "plain"),
    [("auto", "triton", "triton"), ("linear", "linear", "linear"), ("host", "triton", "host")],
)
def test_a_plan_knows_the_losses_of_its_runs(
    loss_impl: str, bags: str, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main([*GOOD, "--tst-loss-impl", loss_impl, "--json", str(file)]) == 0
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["losses"] == {"bags": bags, "plain": plain}
    assert f"loss of bags {bags}, plain {plain}." in capsys.readouterr().out
    flags = [plan["flags"], *(control["flags"] for control in plan["controls"])]
    assert all(("--tst-loss-impl" in each) == (loss_impl != "auto") for each in flags)


def test_money_buys_hours(capsys: pytest.CaptureFixture[str]) -> None:
    tail = ("--model", "3B", "--tokens", "300B", "--price-per-gpu-hour", "4")
    shown = []
    for budget in (("--currency", "988"), ("--gpu-hours", "247")):
        assert main([*budget, *tail]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_mfu_is_the_published_speed(capsys: pytest.CaptureFixture[str]) -> None:
    size = PUBLISHED_MODELS["3B"].size
    used = published_tokens_per_second("3B") * size.flops_per_token(4096) / 2250e12
    assert main([*GOOD, "--mfu", repr(used)]) == 0
    assert "20000 steps" in capsys.readouterr().out


def test_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--published"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("10B-A1B") == 2
    assert "4,923 (+3.2%)" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "7B"}, ("--model is '7B'", "--parameters")),
        ({"--model": None}, ("--model None and --parameters None", "pass one of them")),
        ({"--parameters": "7B"}, ("--model 3B and --parameters 7B", "pass one of them")),
        ({"--hidden-size": "512"}, ("--hidden-size 512", "leave one of them out")),
        ({"--gpus": "0"}, ("--gpus is '0'", "whole number")),
        ({"--gpus": "9" * 5000}, ("--gpus is", "whole number")),
        ({"--gpu": "V100"}, ("--gpu is 'V100'", "H100")),
        ({"--gpu": "H100"}, ("--gpu is H100", "--mfu")),
        ({"--mfu": "40"}, ("--mfu is '40'", "below 1")),
        ({"--mfu": "0.4", "--tokens-per-second-per-gpu": "9"}, ("both set the speed",)),
        ({"--gpu-hours": "-5"}, ("--gpu-hours is '-5'", "above 0")),
        ({"--gpu-hours": "nan"}, ("--gpu-hours is 'nan'", "above 0")),
        ({"--gpu-hours": "1"}, ("--gpu-hours 1", "buys 80 steps", "raise the budget")),
        ({"--gpu-hours": None}, ("--gpu-hours None and --currency None",)),
        ({"--currency": "5"}, ("--gpu-hours 247 and --currency 5",)),
        ({"--gpu-hours": None, "--currency": "5"}, ("--currency 5", "--price-per-gpu-hour")),
        ({"--tokens": "lots"}, ("--tokens is 'lots'", "such as")),
        ({"--tokens": "1M"}, ("--tokens 1e+06", "get data")),
        ({"--tokens": None}, ("--tokens is missing",)),
        ({"--split": "9,1,1,1"}, ("--split is '9,1,1,1'", "three shares")),
        ({"--split": "1e3,1"}, ("--split is '1e3,1'", "such as")),
        ({"--split": "0,1,0"}, ("--split is '0,1,0'", "above 0")),
        ({"--max-epochs": "0.5"}, ("--max-epochs is '0.5'", "at least 1")),
        ({"--tst-bag-size": "1"}, ("--tst-bag-size is 1", "leave it out")),
        ({"--tst-bag-size": "64"}, ("--tst-bag-size is 64", "2 to 32")),
        ({"--tst-step-ratio": "1"}, ("--tst-step-ratio is '1'", "below 1")),
        ({"--tst-step-ratio": "0.95"}, ("--tst-step-ratio is 0.95", "use at most")),
        ({"--tst-schedule": "8:0.5,4"}, ("--tst-schedule is '8:0.5,4'", "write bag size:share")),
        ({"--tst-bag-sizes": "2"}, ("--tst-bag-sizes is '2'", "one as --tst-bag-size")),
        (
            {"--tst-bag-sizes": "2,4", "--tst-schedule": "8:0.1"},
            ("--tst-schedule 8:0.1 and --tst-bag-sizes 2,4", "pass one of them"),
        ),
        ({"--tst-schedule": "8:0.9,4:0.05"}, ("--tst-schedule", "up to 0.9")),
        ({"--tst-schedule": "8:9999,4:90000"}, ("--tst-schedule", "leaves no step")),
        ({"--json": "/nowhere/plan.json"}, ("--json is /nowhere/plan.json", "folder")),
    ],
)
def test_bad_input(
    changes: dict[str, str | None], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**dict(zip(GOOD[::2], GOOD[1::2], strict=True)), **changes}
    arguments = [f"{flag}={value}" for flag, value in options.items() if value is not None]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    for word in words:
        assert word in shown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--parameters", "7B"), "has no published speed"),
        (("--parameters", "7B", "--active-parameters", "8B"), "more than --parameters 7B"),
        (("--parameters", "7B", "--num-layers", "32"), "pass both"),
    ],
)
def test_bad_size(changes: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*changes, "--gpu-hours", "99", "--tokens", "1T"]) == 2
    assert words in capsys.readouterr().err


def test_no_json_appears_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main([*GOOD, "--tst-bag-size", "99", "--json", str(file)]) == 2
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "value"), [("42B", 42e9), ("1.05t", 1.05e12), ("300000", 3e5), (" 2k ", 2e3)]
)
def test_token_counts(text: str, value: float) -> None:
    assert parse_tokens("--tokens", text) == pytest.approx(value)


def test_planning_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_tst.commands.plan_run;"
        "sys.exit(any(m.split('.')[0] in ('torch', 'megatron') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_estimates_of_nearby_sizes_lie_between() -> None:
    tokens = 20_000 * 2**21
    between = loss_model(ModelSize("1.4B", 1_400_000_000, 1_400_000_000)).baseline(tokens)
    assert isinstance(between, Estimate)
    assert 2.808 < between.value < 3.0186
    assert between.outside
