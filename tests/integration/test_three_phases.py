"""A run with bags of 8, then of 4, then single tokens: trained, resumed, checked and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.saved_accounting import check_accounting
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.report.results import read_result
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal
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


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_that_goes_on_at_a_switch_or_before_is_the_same(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, step: int
) -> None:
    run = trained.with_(
        tmp_path,
        load=trained.folder / "checkpoints",
        ckpt_step=step,
        save=tmp_path / "checkpoints",
        tensorboard_dir=tmp_path / "tensorboard",
    )
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))


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
        (
            {"tst_exclude_documents": "documents"},
            "leaves 1 documents out of a run of --tst-schedule 8:2,4:3 that has begun",
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
    if "tst_exclude_documents" in arguments:
        arguments = {"tst_exclude_documents": tmp_path / "documents"}
        arguments["tst_exclude_documents"].write_text(f"{trained.corpus}:0\n")
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
