"""Pre-training end to end, on Megatron's own loop."""

from __future__ import annotations

import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.layouts import MODELS
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal, assert_faultless
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH = 5
BAG_SIZE = 4
SUPERPOSED: dict[str, Any] = {"tst_bag_size": BAG_SIZE, "tst_steps": SWITCH}


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """A run that was not interrupted, with a checkpoint every third step and at the switch."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("reference"))
    # Dropout, so that a random state lost at a restart would show.
    run = run.with_(**SUPERPOSED, bf16=True, save_interval=3, hidden_dropout=0.1)
    launcher.run(run.argv, run.log)
    return run


@pytest.fixture(scope="module")
def stock(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of plain Megatron."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("stock")).with_(bf16=True)
    launcher.run(run.argv, run.log, main="tests.stock_gpt:main")
    return run


def test_the_switch_happens_inside_the_run(reference: SmallRun) -> None:
    scalars = reference.scalars()
    bag_sizes = scalars["tst/bag size"]
    expected = {step: BAG_SIZE if step <= SWITCH else 1 for step in range(1, TOTAL_STEPS + 1)}
    assert bag_sizes == expected
    losses = scalars["lm loss"]
    assert sorted(losses) == sorted(expected)
    assert all(math.isfinite(loss) for loss in losses.values())
    # Untrained: every byte is equally likely, in a bag or alone.
    assert losses[1] == pytest.approx(math.log(256), abs=0.05)
    assert losses[TOTAL_STEPS] < losses[1] - 0.3


def test_a_checkpoint_is_written_at_the_switch(reference: SmallRun) -> None:
    saved = sorted(p.name for p in (reference.folder / "checkpoints").glob("iter_*"))
    steps = sorted({*range(3, TOTAL_STEPS + 1, 3), SWITCH})
    assert saved == [f"iter_{step:07d}" for step in steps]


def test_text_read_is_accounted_for(reference: SmallRun) -> None:
    scalars = reference.scalars()
    positions = 4 * 32  # global batch size times sequence length
    for step in range(1, TOTAL_STEPS + 1):
        in_phase_1 = min(step, SWITCH)
        read = positions * (in_phase_1 * BAG_SIZE + step - in_phase_1)
        assert scalars["tst/data tokens"][step] == read
        assert scalars["tst/equivalent tokens"][step] == positions * step
    assert scalars["tst/seconds"][TOTAL_STEPS] > scalars["tst/seconds"][1] > 0


def test_one_learning_rate_schedule_spans_both_phases(reference: SmallRun) -> None:
    rates = reference.scalars()["learning-rate"]
    assert [rates[step] for step in (SWITCH, SWITCH + 1)] == pytest.approx([3e-3, 3e-3])
    assert rates[TOTAL_STEPS] == pytest.approx(0.0, abs=1e-9)


def test_loss_by_offset_is_logged_in_phase_1_only(reference: SmallRun) -> None:
    scalars = reference.scalars()
    steps = list(range(1, SWITCH + 1))
    offsets = [scalars[f"tst/loss at offset {i}"] for i in range(1, BAG_SIZE + 1)]
    assert all(sorted(values) == steps for values in offsets)
    # Uniform weights: the training loss is the mean over the offsets (bf16 logits, fp32 sums).
    for step in steps:
        mean = sum(values[step] for values in offsets) / BAG_SIZE
        assert scalars["lm loss"][step] == pytest.approx(mean, rel=1e-5)


def test_validation_is_next_token_loss_in_both_phases(reference: SmallRun) -> None:
    validation = reference.scalars()["lm loss validation"]
    assert sorted(validation) == [4, 8, TOTAL_STEPS]
    assert validation[TOTAL_STEPS] < validation[4] < math.log(256) + 0.05


def test_settings_are_printed_and_described(reference: SmallRun) -> None:
    log = reference.log.read_text()
    assert f"switch_step............. {SWITCH} of {TOTAL_STEPS}" in log
    assert "target_weighting........ uniform" in log
    description = reference.description()
    assert description["switch_step"] == SWITCH
    assert description["superposition"]["bag_size"] == BAG_SIZE
    assert description["parameters"] == sum(
        tensor.numel()
        for name, tensor in reference.checkpoint(SWITCH).items()
        if name.startswith(("embedding", "decoder", "output_layer"))
    )


@pytest.mark.parametrize("stop", [3, SWITCH, 9], ids=["phase 1", "switch", "phase 2"])
def test_a_stopped_run_resumes_bit_equal(
    launcher: Launcher, reference: SmallRun, tmp_path: Path, stop: int
) -> None:
    run = reference.with_(tmp_path / "resumed")
    launcher.run(run.with_(exit_interval=stop).argv, run.log)
    assert not (run.folder / "checkpoints" / f"iter_{TOTAL_STEPS:07d}").exists()
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), reference.checkpoint(TOTAL_STEPS))
    losses = run.scalars()["lm loss"]
    assert losses == reference.scalars()["lm loss"]


@pytest.mark.parametrize("kill_at", [4, 8], ids=["phase 1", "phase 2"])
def test_a_killed_run_resumes_bit_equal(
    launcher: Launcher, reference: SmallRun, tmp_path: Path, kill_at: int
) -> None:
    run = reference.with_(tmp_path / "killed")
    started = launcher.start(run.argv, run.log)
    _wait_for(started.log, f" step {kill_at:8d}/")
    started.kill(signum=signal.SIGKILL)
    assert launcher.wait(started) == [-signal.SIGKILL]
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), reference.checkpoint(TOTAL_STEPS))


def test_without_superposition_the_run_is_upstreams(
    launcher: Launcher, small_run: SmallRun, stock: SmallRun
) -> None:
    ours = small_run.with_(bf16=True, tst_bag_size=1)
    launcher.run(ours.argv, ours.log)
    assert_bit_equal(ours.checkpoint(TOTAL_STEPS), stock.checkpoint(TOTAL_STEPS))
    expected, actual = stock.scalars(), ours.scalars()
    assert actual["lm loss"] == expected["lm loss"]
    assert actual["grad-norm"] == expected["grad-norm"]
    assert ours.description()["losses"] == {"plain": "cpu"}


def test_without_superposition_mup_is_upstreams(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path
) -> None:
    mup = {**MODELS["muP, learned positions"], "train_iters": 4, "lr_wsd_decay_iters": 1}
    ours = small_run.with_(**mup, tst_bag_size=1, eval_iters=0)
    stock = small_run.with_(tmp_path, **mup, eval_iters=0)
    launcher.run(ours.argv, ours.log)
    launcher.run(stock.argv, stock.log, main="tests.stock_gpt:main")
    assert_bit_equal(ours.checkpoint(4), stock.checkpoint(4))


def test_without_superposition_a_run_takes_the_loss_that_is_asked_for(
    launcher: Launcher, small_run: SmallRun, stock: SmallRun, tmp_path: Path
) -> None:
    ours = small_run.with_(tmp_path, bf16=True, tst_bag_size=1, tst_loss_impl="torch")
    launcher.run(ours.argv, ours.log)
    expected, actual = stock.scalars(), ours.scalars()
    # The weights are bf16, and the losses of one step agree to float32 noise.
    assert actual["lm loss"][1] == pytest.approx(expected["lm loss"][1], rel=1e-6)
    assert actual["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-3)
    assert ours.description()["losses"] == {"plain": "torch"}


@pytest.mark.parametrize("superposed", [{}, SUPERPOSED], ids=["baseline", "bags"])
def test_mock_data_trains_without_a_corpus(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path, superposed: dict[str, Any]
) -> None:
    mock = {"data_path": None, "split": None, "mock_data": True}
    run = small_run.with_(tmp_path, **superposed, **mock)
    launcher.run(run.argv, run.log)
    losses = run.scalars()["lm loss"]
    assert losses[TOTAL_STEPS] < math.log(256)
    switch, bag_size = (SWITCH, BAG_SIZE) if superposed else (0, 1)
    read = 128 * (switch * bag_size + TOTAL_STEPS - switch)
    assert run.scalars()["tst/data tokens"][TOTAL_STEPS] == read
    (path,) = run.description()["settings"]["data_path"]
    assert Path(path).parent.parent == tmp_path / "cache"


def test_a_superposed_checkpoint_has_upstreams_keys(reference: SmallRun, stock: SmallRun) -> None:
    expected = {name: tensor.shape for name, tensor in stock.checkpoint(TOTAL_STEPS).items()}
    for step in (3, SWITCH, TOTAL_STEPS):
        saved = reference.checkpoint(step)
        assert {name: tensor.shape for name, tensor in saved.items()} == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"tst_variant": "input-only"},
        {"tst_variant": "output-only"},
        {"tst_target_weighting": "power-law", "tst_power_law_exponent": 1.25},
        {"tst_target_weighting": "exponential"},
        {"tst_target_weighting": "first-token"},
        {"tst_objective": "mce-sum"},
        {"tst_objective": "bce"},
        {"tst_objective": "hinge"},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_every_variant_trains_through_the_switch(
    launcher: Launcher, small_run: SmallRun, settings: dict[str, Any]
) -> None:
    run = small_run.with_(**SUPERPOSED, **settings, eval_iters=0)
    launcher.run(run.argv, run.log)
    losses = run.scalars()["lm loss"]
    assert losses[SWITCH] < losses[1]
    assert losses[TOTAL_STEPS] < math.log(256) - 0.2
    reads_bags = settings.get("tst_variant") != "output-only"
    read = 128 * (SWITCH * (BAG_SIZE if reads_bags else 1) + TOTAL_STEPS - SWITCH)
    assert run.scalars()["tst/data tokens"][TOTAL_STEPS] == read


def test_bags_of_8_weigh_targets_by_the_power_law(launcher: Launcher, small_run: SmallRun) -> None:
    run = small_run.with_(tst_bag_size=8, tst_steps=2, train_iters=4, eval_iters=0)
    launcher.run(run.argv, run.log)
    assert run.description()["superposition"]["target_weighting"] == "power-law"


def test_resets_at_the_switch(launcher: Launcher, reference: SmallRun, tmp_path: Path) -> None:
    kept = reference.checkpoint(SWITCH)
    heads = ("embedding.word_embeddings.weight", "output_layer.weight")

    embeddings = reference.with_(tmp_path / "embeddings", tst_reset_at_switch="embeddings")
    launcher.run(embeddings.argv, embeddings.log)
    assert_faultless(embeddings.checkpoint_folder(SWITCH))
    saved = embeddings.checkpoint(SWITCH)
    for name in kept:
        belongs_to_reset = any(head in name for head in heads) and "exp_avg" not in name
        assert torch.equal(saved[name], kept[name]) != belongs_to_reset, name
    assert saved[heads[0]].float().std() == pytest.approx(0.02, rel=0.1)

    optimizer = reference.with_(tmp_path / "optimizer", tst_reset_at_switch="optimizer")
    launcher.run(optimizer.argv, optimizer.log)
    assert_faultless(optimizer.checkpoint_folder(SWITCH))
    saved = optimizer.checkpoint(SWITCH)
    moments = [name for name in saved if "exp_avg" in name]
    assert moments
    assert all(not saved[name].any() for name in moments)
    assert_bit_equal(
        {name: saved[name] for name in kept if name not in moments},
        {name: kept[name] for name in kept if name not in moments},
    )


def test_metrics_reach_wandb_through_megatrons_flags(
    launcher: Launcher, small_run: SmallRun
) -> None:
    run = small_run.with_(
        tst_bag_size=2,
        tst_steps=2,
        train_iters=4,
        eval_iters=0,
        wandb_project="tests",
        wandb_exp_name="small",
        wandb_save_dir=small_run.folder,
    )
    launcher.run(run.argv, run.log, environment={"WANDB_MODE": "offline"})
    (recorded,) = run.folder.rglob("*.wandb")
    # The file is a log of uncompressed records.
    content = recorded.read_bytes()
    for name in ("tst/data tokens", "tst/bag size", "tst/loss at offset 2", "lm loss"):
        assert name.encode() in content, name


def test_the_final_evaluation_is_written(launcher: Launcher, small_run: SmallRun) -> None:
    run = small_run.with_(train_iters=2, lr_wsd_decay_iters=1, lr_warmup_iters=1, tst_steps=1)
    launcher.run(run.argv, run.log, main="tests.slow_tensorboard:main")
    assert set(run.scalars()["lm loss validation"]) == {2}


@pytest.fixture(scope="module")
def single(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """One process in fp32, with a checkpoint after its first step."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("single"))
    run = run.with_(**SUPERPOSED)
    launcher.run(run.with_(exit_interval=1).argv, run.log)
    shutil.copytree(run.folder / "checkpoints", run.folder / "first step")
    launcher.run(run.argv, run.log)
    return run


@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=["data parallel", "tensor parallel", "pipeline parallel"],
)
def test_two_processes_train_as_one(
    launcher: Launcher, single: SmallRun, tmp_path: Path, layout: dict[str, Any]
) -> None:
    # From the first step's checkpoint on: pipeline stages draw their weights from other seeds. The
    # distributed optimizer stores its state in a layout of its own, so it starts from scratch.
    double = single.with_(tmp_path / "double", **layout)
    if "use_distributed_optimizer" not in layout:
        shutil.copytree(single.folder / "first step", double.folder / "checkpoints")
    launcher.run(double.argv, double.log, world_size=2)
    expected, actual = single.scalars(), double.scalars()
    for tag in ("lm loss", "lm loss validation", "tst/loss at offset 4", "tst/data tokens"):
        # fp32: sums run in another order, and twelve steps of Adam amplify the last bits.
        wanted = {step: expected[tag][step] for step in actual[tag]}
        assert len(wanted) >= min(len(expected[tag]), 4) - 1
        assert actual[tag] == pytest.approx(wanted, rel=1e-5), tag
    assert double.description()["parameters"] == single.description()["parameters"]


def _wait_for(log: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text(errors="replace"):
            return
        time.sleep(0.01)
    raise TimeoutError(f"{text!r} did not appear in {log}")
