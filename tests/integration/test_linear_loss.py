"""Output layer and loss in one, on Megatron's own loop: the same run as with whole logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.layouts import MODELS
from tests.runs import SmallRun
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH, STEPS = 4, 8
SUPERPOSED: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": SWITCH, "train_iters": STEPS}
# fp32: the vocabulary is summed up in another order; measured 2e-7 for losses.
SAME: dict[str, Any] = {"rel": 1e-6}


def start(launcher: Launcher, run: SmallRun) -> SmallRun:
    """A run to its end, with its first step's checkpoint kept for others to start from."""
    launcher.run(run.with_(exit_interval=1).argv, run.log)
    shutil.copytree(run.folder / "checkpoints", run.folder / "first step")
    launcher.run(run.argv, run.log)
    return run


def assert_same_run(actual: SmallRun, expected: SmallRun) -> None:
    theirs, ours = expected.scalars(), actual.scalars()
    offsets = [f"tst/loss at offset {i}" for i in range(1, 5)]
    for tag in ("lm loss", "lm loss validation", *(tag for tag in offsets if tag in theirs)):
        wanted = {step: theirs[tag][step] for step in ours[tag]}
        assert len(wanted) >= min(len(theirs[tag]), 4) - 1
        assert ours[tag] == pytest.approx(wanted, **SAME), tag
    wanted = {step: theirs["grad-norm"][step] for step in ours["grad-norm"]}
    assert ours["grad-norm"] == pytest.approx(wanted, rel=1e-5)
    assert STEPS in wanted


@pytest.fixture(scope="module")
def dense(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return start(launcher, SmallRun(corpus, tmp_path_factory.mktemp("dense")).with_(**SUPERPOSED))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {}),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["one process", "data parallel", "tensor parallel", "sequence parallel", "pipeline"],
)
def test_a_run_is_that_of_whole_logits(
    launcher: Launcher, dense: SmallRun, tmp_path: Path, processes: int, layout: dict[str, Any]
) -> None:
    run = dense.with_(tmp_path, tst_loss_impl="linear", **layout)
    if "use_distributed_optimizer" not in layout:
        shutil.copytree(dense.folder / "first step", run.folder / "checkpoints")
    launcher.run(run.argv, run.log, world_size=processes)
    assert_same_run(run, dense)


@pytest.mark.parametrize(
    "settings",
    [
        MODELS["Llama, tied embeddings"],
        MODELS["Llama, hybrid"],
        MODELS["Qwen3-MoE"],
        MODELS["muP, learned positions"],
        {"tst_variant": "input-only"},
        {"tst_target_weighting": "power-law"},
        {"tst_bag_size": 1, "tst_steps": None},
    ],
    ids=["tied", "hybrid", "experts", "muP", "input-only", "power law", "bag size 1"],
)
def test_other_models_and_variants(
    launcher: Launcher, corpus: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = SmallRun(corpus, tmp_path / "dense").with_(**{**SUPERPOSED, **settings})
    linear = run.with_(tmp_path / "linear", tst_loss_impl="linear")
    for each in (run, linear):
        launcher.run(each.argv, each.log)
    assert_same_run(linear, run)
