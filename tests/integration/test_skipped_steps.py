"""Steps of --iterations-to-skip: their text is read, nothing is trained, and the phases stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from tests.corpus import write_corpus
from tests.runs import SmallRun, assert_bit_equal, assert_faultless
from tests.survival import (
    BAG_SIZE,
    BATCH,
    MAIN,
    SETTINGS,
    SWITCH,
    TOTAL,
    kill,
    last_checkpoint,
    wait_until_stopped,
)
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

LENGTH = 32
# The first step, the one before the switch, and the last one.
SKIPPED = [1, SWITCH, TOTAL]
DONE = [step for step in range(1, TOTAL + 1) if step not in SKIPPED]


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """One process that reads its text to the last token, and was not interrupted."""
    folder = tmp_path_factory.mktemp("skipped")
    tokens = BATCH * LENGTH * (SWITCH * BAG_SIZE + TOTAL - SWITCH)
    write_corpus(folder / "text", [1000, 7, tokens - 1007], vocabulary_size=256)
    text: dict[str, Any] = {"data_path": folder / "text", "split": "100,0,0", "hidden_dropout": 0}
    settings: dict[str, Any] = {
        **{**SETTINGS, **text},
        "iterations_to_skip": SKIPPED,
        "save_interval": SWITCH,
        "tst_reset_at_switch": "optimizer",
        # Two for each of two stages.
        "num_layers": 4,
    }
    run = SmallRun(corpus, folder).with_(**settings)
    environment = {name: str(folder / name.lower()) for name in ("RECORD_READS", "RECORD_BATCHES")}
    launcher.run(run.argv, run.log, main=MAIN, environment=environment)
    return run


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_token_is_read_once_and_skipped_ones_are_not_trained(reference: SmallRun) -> None:
    reads = lines(reference.folder / "record_reads" / "rank0")
    assert [read["index"] for read in reads] == list(range(TOTAL * BATCH))
    in_phase_1 = SWITCH * BATCH
    sizes = [LENGTH * (BAG_SIZE if read["index"] < in_phase_1 else 1) for read in reads]
    assert [read["tokens"] for read in reads] == sizes
    batches = lines(reference.folder / "record_batches" / "rank0")
    assert sorted({step for step, _, _ in batches}) == DONE
    scalars = reference.scalars()
    assert sorted(scalars["lm loss"]) == DONE
    for step in DONE:
        in_bags = min(step, SWITCH)
        read = LENGTH * BATCH * (in_bags * BAG_SIZE + step - in_bags)
        assert scalars["tst/data tokens"][step] == read
        assert scalars["tst/bag size"][step] == (BAG_SIZE if step <= SWITCH else 1)


def test_what_lies_behind_skipped_steps_is_saved_before_them(reference: SmallRun) -> None:
    folders = sorted((reference.folder / "checkpoints").glob("iter_*"))
    saved = [SWITCH - 1, TOTAL - 1]
    # At the switch and at the end it is due, and neither step is done.
    assert folders == [reference.checkpoint_folder(step) for step in saved]
    assert_faultless(*folders)


def test_the_switch_happens_though_its_step_is_skipped(reference: SmallRun) -> None:
    assert f"switching to next-token prediction after {SWITCH} steps" in reference.log.read_text()
    states = [
        TorchDistCheckpoint(reference.checkpoint_folder(step)).read_common()["optimizer"]
        for step in (SWITCH - 1, TOTAL - 1)
    ]
    # The optimizer was reset in between.
    steps = [state["param_groups"][0]["step"] for state in states]
    assert steps == [SWITCH - 2, TOTAL - 1 - SWITCH]


def test_a_killed_run_resumes_bit_equal(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path)
    environment = {"STOP_AFTER": str(SWITCH + 1)}
    started = launcher.start(run.argv, run.log, main=MAIN, environment=environment)
    wait_until_stopped(started)
    kill(launcher, started)
    assert last_checkpoint(run) == SWITCH - 1
    # The first step of this start is skipped, and it is the switch; then there is nothing left.
    for _ in range(2):
        launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL - 1), reference.checkpoint(TOTAL - 1))
    assert run.scalars()["lm loss"] == reference.scalars()["lm loss"]


@pytest.fixture(scope="module")
def alone(
    launcher: Launcher, reference: SmallRun, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """One process, from weights that other layouts can start from too."""
    start = {"pretrained_checkpoint": reference.folder / "checkpoints"}
    run = reference.with_(tmp_path_factory.mktemp("alone"), **start)
    launcher.run(run.argv, run.log)
    return run


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        {"context_parallel_size": 2},
    ],
    ids=["TP 2 + SP", "PP 2, interleaved", "CP 2"],
)
def test_a_layout_trains_as_one_process(
    launcher: Launcher, alone: SmallRun, tmp_path: Path, layout: dict[str, Any]
) -> None:
    run = alone.with_(tmp_path, **layout)
    launcher.run(run.argv, run.log, 2)
    # fp32: sums of two processes are in another order.
    assert run.scalars()["lm loss"] == pytest.approx(alone.scalars()["lm loss"], rel=1e-5)


def test_a_baseline_skips_as_plain_megatron(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path
) -> None:
    run = small_run.with_(iterations_to_skip=[2, 5], train_iters=7, eval_iters=0)
    stock = run.with_(tmp_path / "stock")
    launcher.run(run.argv, run.log)
    launcher.run(stock.argv, stock.log, main="tests.stock_gpt:main")
    assert_bit_equal(run.checkpoint(7), stock.checkpoint(7))
