"""Multi-token prediction through the switch: against float64, plain Megatron, and an interruption.

What it does in parallel layouts is in ``test_layouts.py``, and how plain Megatron goes on with it
in ``test_stock_megatron.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests import multi_token_checks
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

CHECKS = sorted(name for name in vars(multi_token_checks) if name.startswith("check_"))
SWITCH, BAG_SIZE, DEPTHS = 5, 4, 2
LOSSES = ["lm loss", *(f"mtp_{depth} loss" for depth in range(1, DEPTHS + 1))]
RATES = [f"mtp_{depth}_acceptance_rate" for depth in range(1, DEPTHS + 1)]
SUPERPOSED: dict[str, Any] = {"tst_bag_size": BAG_SIZE, "tst_steps": SWITCH}


@pytest.mark.parametrize("check", CHECKS)
def test_against_float64(launcher: Launcher, tmp_path: Path, check: str) -> None:
    launcher.run([check], tmp_path / "log", main="tests.multi_token_checks:main")


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run that was not interrupted."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("trained"))
    # Dropout, so that a random state lost at a restart would show.
    run = run.with_(**SUPERPOSED, mtp_num_layers=DEPTHS, save_interval=2, hidden_dropout=0.1)
    launcher.run(run.argv, run.log)
    return run


def test_every_depth_learns_in_both_phases(trained: SmallRun) -> None:
    scalars = trained.scalars()
    for tag in LOSSES:
        losses = scalars[tag]
        assert sorted(losses) == list(range(1, TOTAL_STEPS + 1))
        # Untrained: every byte is equally likely, in a bag or alone.
        assert losses[1] == pytest.approx(math.log(256), abs=0.05)
        assert losses[SWITCH] < losses[1] - 0.02
        assert losses[TOTAL_STEPS] < losses[SWITCH]
    assert all(0 <= scalars[tag][TOTAL_STEPS] <= 100 for tag in RATES)


def test_the_loss_by_offset_is_that_of_the_model_alone(trained: SmallRun) -> None:
    scalars = trained.scalars()
    offsets = [scalars[f"tst/loss at offset {i}"] for i in range(1, BAG_SIZE + 1)]
    for step in range(1, SWITCH + 1):
        mean = sum(values[step] for values in offsets) / BAG_SIZE
        assert scalars["lm loss"][step] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("stop", [2, SWITCH, 8], ids=["phase 1", "switch", "phase 2"])
def test_a_stopped_run_resumes_bit_equal(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, stop: int
) -> None:
    run = trained.with_(tmp_path, load=trained.folder / "checkpoints", ckpt_step=stop)
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))
    expected, actual = trained.scalars(), run.scalars()
    for tag in (*LOSSES, *RATES):
        assert actual[tag] == {s: expected[tag][s] for s in range(stop + 1, TOTAL_STEPS + 1)}


def test_without_superposition_the_run_is_upstreams(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path
) -> None:
    ours = small_run.with_(mtp_num_layers=DEPTHS, bf16=True, tst_bag_size=1)
    launcher.run(ours.argv, ours.log)
    stock = small_run.with_(tmp_path / "stock", mtp_num_layers=DEPTHS, bf16=True)
    launcher.run(stock.argv, stock.log, main="tests.stock_gpt:main")
    assert_bit_equal(ours.checkpoint(TOTAL_STEPS), stock.checkpoint(TOTAL_STEPS))
    expected, actual = stock.scalars(), ours.scalars()
    for tag in (*LOSSES, *RATES, "grad-norm"):
        assert actual[tag] == expected[tag]
