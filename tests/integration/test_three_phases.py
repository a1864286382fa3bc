"""Runs with bags of several sizes, then single tokens: trained, resumed, checked and read."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.saved_accounting import check_accounting
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.report.results import read_result
from tests.integration.layouts import LAYOUTS, MODELS
from tests.integration.test_bad_input import assert_messages
from tests.runs import TOTAL_STEPS, Check, SmallRun, assert_bit_equal, assert_faultless
from tests.survival import MAIN, last_checkpoint, wait_until_stopped
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    "tst_schedule": "8:2,4:3",
    "tst_target_weighting": "power-law",
    "save_interval": 4,
}
BAG_SIZES = [8, 8, 4, 4, 4, *[1] * 7]
POSITIONS = 4 * 32  # global batch size times sequence length


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(corpus, tmp_path_factory.mktemp("phases")).with_(**ARGUMENTS)
    launcher.run(run.argv, run.log)
    return run


def test_every_phase_trains_and_is_accounted_for(trained: SmallRun) -> None:
    scalars, steps = trained.scalars(), range(1, TOTAL_STEPS + 1)
    assert scalars["tst/bag size"] == dict(zip(steps, BAG_SIZES, strict=True))
    read = [POSITIONS * sum(BAG_SIZES[:step]) for step in steps]
    assert scalars["tst/data tokens"] == dict(zip(steps, read, strict=True))
    # Each step costs the same.
    assert scalars["tst/equivalent tokens"] == {step: POSITIONS * step for step in steps}
    assert sorted(scalars["tst/loss at offset 4"]) == [1, 2, 3, 4, 5]
    assert sorted(scalars["tst/loss at offset 8"]) == [1, 2]
    # Power-law weights of the bags' own size.
    for step, size in ((2, 8), (5, 4)):
        weights = [1 / i for i in range(1, size + 1)]
        losses = [scalars[f"tst/loss at offset {i}"][step] for i in range(1, size + 1)]
        mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        assert scalars["lm loss"][step] == pytest.approx(mean, rel=1e-5)
    log = trained.log.read_text()
    assert "> switching to bags of 4 after 2 steps" in log
    assert "> switching to next-token prediction after 5 steps" in log
    saved = sorted(path.name for path in (trained.folder / "checkpoints").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in (2, 4, 5, 8, TOTAL_STEPS)]


def resumed(trained: SmallRun, folder: Path, step: int, **arguments: Any) -> SmallRun:
    """The run from its checkpoint of a step on, in another folder."""
    return trained.with_(
        folder, load=trained.folder / "checkpoints", ckpt_step=step, save_interval=100, **arguments
    )


# How text is found and read, not what: with the last of these, in the cache that there is.
DATA_ACCESS: dict[str, Any] = {
    "num_dataset_builder_threads": 2,
    "mid_level_dataset_surplus": 0.5,
    "no_mmap_bin_files": True,
    "num_workers": 1,
    "no_data_sharding": True,
    "dataloader_defer_npy_index_mmap": True,
}


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_that_goes_on_at_a_switch_or_before_is_the_same(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, step: int
) -> None:
    run = resumed(trained, tmp_path, step)
    if step == 4:
        run = run.with_(**DATA_ACCESS, data_cache_path=trained.folder / "cache")
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))


@pytest.mark.parametrize(
    ("step", "layout"), [(2, "TP 2 + SP"), (4, "PP 2"), (4, "CP 2"), (5, "DP 2")]
)
def test_it_goes_on_at_another_layout(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, step: int, layout: str
) -> None:
    settings = {**LAYOUTS[layout].arguments, "micro_batch_size": 1}
    run = resumed(trained, tmp_path, step, **settings)
    launcher.run(run.argv, run.log, world_size=LAYOUTS[layout].processes)
    for tag in ("lm loss", "tst/data tokens", "tst/bag size"):
        actual, expected = run.scalars()[tag], trained.scalars()[tag]
        assert sorted(actual) == list(range(step + 1, TOTAL_STEPS + 1))
        # fp32: sums run in another order.
        assert actual == pytest.approx({s: expected[s] for s in actual}, rel=1e-6), tag
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tst_schedule": None, "tst_bag_sizes": "2,4", "tst_steps": 7}],
    ids=["schedule", "drawn"],
)
@pytest.mark.parametrize("layout", ["EP 2, alltoall", "TP 2 + SP, EP 2, distributed optimizer"])
def test_experts_on_several_ranks_train_as_on_one(
    launcher: Launcher, corpus: Path, tmp_path: Path, layout: str, sizes: dict[str, Any]
) -> None:
    settings = {**MODELS["Qwen3-MoE"], **ARGUMENTS, **sizes, "micro_batch_size": 1}
    one = SmallRun(corpus, tmp_path / "one").with_(**settings)
    launcher.run(one.argv, one.log)
    # Each rank draws the first weights of its own experts, and a sharded optimizer begins anew.
    start = one.with_(no_load_optim=True)
    arguments = LAYOUTS[layout].arguments
    same = resumed(start, tmp_path / "same", 4)
    run = resumed(start, tmp_path / "several", 4, **arguments)
    launcher.run(same.argv, same.log)
    launcher.run(run.argv, run.log, world_size=LAYOUTS[layout].processes)
    assert len({*same.scalars()["tst/bag size"].values()}) == (3 if sizes else 2)
    for tag in ("lm loss", "grad-norm", "load_balancing_loss", "tst/data tokens", "tst/bag size"):
        actual, expected = run.scalars()[tag], same.scalars()[tag]
        assert sorted(actual) == list(range(5, TOTAL_STEPS + 1))
        # fp32: sums run in another order.
        assert actual == pytest.approx(expected, rel=1e-5), tag
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))


def test_it_is_killed_inside_of_a_phase(
    launcher: Launcher, trained: SmallRun, tmp_path: Path
) -> None:
    run = trained.with_(tmp_path)
    started = launcher.start(run.argv, run.log, main=MAIN, environment={"STOP_AFTER": "3"})
    wait_until_stopped(started)
    started.kill(signum=signal.SIGKILL)
    assert launcher.wait(started) == [-signal.SIGKILL]
    # That of the switch.
    assert last_checkpoint(run) == 2
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))


BAD = {
    "8:0.5,4:0.6": r"its shares add up to 1\.1, keep them below 1: the rest is plain",
    "8:4,4:8": "of 12 steps leaves no step for the last phase",
    "8:0,4:3": "each bag size needs a share or a count of steps above 0",
    "8:0.01,4:0.3": "of 12 steps gives bags of 8 no step: raise their share",
    "1:0.1": "bag sizes are 2 or more",
    "4:2,4:2": "bag size 4 follows itself, write one entry of both lengths",
    "4:2;2:2": "write bag size:share of the steps, or bag size:steps",
}


def test_schedules_that_cannot_be(check: Check, trained: SmallRun, tmp_path: Path) -> None:
    new = trained.with_(tmp_path)
    found = check([new.with_(tst_schedule=text) for text in BAD])
    assert_messages(found, list(BAD.values()))


def test_more_text_than_there_is(launcher: Launcher, trained: SmallRun, tmp_path: Path) -> None:
    run = trained.with_(tmp_path, tst_schedule="4:2,4000:3")
    assert launcher.wait(launcher.start(run.argv, run.log)) == [2]
    text = run.log.read_text()
    read = POSITIONS * (2 * 4 + 3 * 4000)
    assert f"{read + 7 * POSITIONS:,} tokens ({read:,} in phases 1 to 2) of " in text
    assert "Use smaller bags or fewer steps in --tst-schedule. --tst-variant output-only" in text


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (
            {"tst_schedule": None, "tst_bag_size": 8, "tst_steps": 5},
            "was trained with bags of 8 from sample 0 (step 0) on, bags of 4 from sample 8 (step "
            "2) on, bags of 1 from sample 20 (step 5) on, and this command has bags of 8 "
            "from sample 0 (step 0) on, bags of 1 from sample 20 (step 5) on: keep its phases",
        ),
        (
            {"tst_bag_size": 8},
            "--tst-schedule 8:2,4:3 and --tst-bag-size 8 both set bag sizes or their steps: pass "
            "one of them",
        ),
    ],
)
def test_what_it_does_not_resume_with(
    launcher: Launcher,
    trained: SmallRun,
    tmp_path: Path,
    arguments: dict[str, Any],
    refusal: str,
) -> None:
    checkpoints = trained.folder / "checkpoints"
    other = trained.with_(tmp_path, load=checkpoints, ckpt_step=2, **arguments)
    assert launcher.wait(launcher.start(other.argv, other.log)) == [2]
    assert refusal in other.log.read_text()


def test_its_checkpoint_counts_right(trained: SmallRun) -> None:
    checkpoint = TorchDistCheckpoint(trained.checkpoint_folder(2))
    found = check_accounting("iter_0000002", checkpoint.read_common())
    assert not found.faults
    assert not found.notes
    tokens = f"{16 * POSITIONS:,} data tokens"
    expected = (
        f"step 2 of 12, phase 2, switches at steps 2 and 5, bags of 8 and 4, 8 samples, {tokens}"
    )
    assert found.summary.startswith(expected)


def test_the_report_reads_it(trained: SmallRun) -> None:
    result = read_result(trained.folder)
    assert result.settings["bags"] == "8:2+4:3"
    assert [(phase.first_step, phase.bag_size) for phase in result.phases] == [
        (0, 8),
        (2, 4),
        (5, 1),
    ]
    assert result.data_tokens[-1] == POSITIONS * sum(BAG_SIZES)
    losses = trained.scalars()
    last = [losses[f"tst/loss at offset {i}"][5] for i in range(1, 5)]
    assert result.offset_losses == pytest.approx(last, rel=1e-6)
