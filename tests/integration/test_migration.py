"""What docs/migrating.md says of runs and scripts that were made for plain Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.layouts import MODELS
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

STOCK = "tests.stock_gpt:main"
STOP, SWITCH = 6, 4
SUPERPOSED: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": SWITCH}


@pytest.fixture(scope="module")
def stock(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of plain Megatron that was not interrupted, with a checkpoint half-way."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("stock"))
    # Dropout, so that a random state that does not carry over would show.
    run = run.with_(bf16=True, hidden_dropout=0.1, save_interval=STOP)
    launcher.run(run.argv, run.log, main=STOCK)
    return run


def test_a_baseline_under_way_goes_on_bit_for_bit(
    launcher: Launcher, stock: SmallRun, tmp_path: Path
) -> None:
    """With the arguments of its script, without --tst-*, and the folder of its data cache."""
    run = stock.with_(
        tmp_path,
        load=stock.folder / "checkpoints",
        ckpt_step=STOP,
        save=tmp_path / "checkpoints",
        tensorboard_dir=tmp_path / "tensorboard",
        data_cache_path=stock.folder / "cache",
    )
    launcher.run(run.argv, run.log)
    expected, actual = stock.scalars(), run.scalars()
    steps = range(STOP + 1, TOTAL_STEPS + 1)
    for scalar in ("lm loss", "grad-norm", "learning-rate"):
        assert actual[scalar] == {step: expected[scalar][step] for step in steps}
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), stock.checkpoint(TOTAL_STEPS))


def test_superposition_as_a_new_run_from_the_weights_of_a_baseline(
    launcher: Launcher, stock: SmallRun, tmp_path: Path
) -> None:
    """One command starts it and, started again, continues what it has saved itself."""
    run = stock.with_(
        tmp_path,
        **SUPERPOSED,
        pretrained_checkpoint=stock.folder / "checkpoints",
        load=tmp_path / "checkpoints",
        save=tmp_path / "checkpoints",
        tensorboard_dir=tmp_path / "tensorboard",
        data_cache_path=tmp_path / "cache",
    )
    launcher.run(run.with_(exit_interval=2).argv, run.log)
    first = run.scalars()["lm loss"]
    assert sorted(first) == [1, 2]
    # Bags of the baseline's text are new to it, and its weights are not those of a new model.
    assert first[1] < stock.scalars()["lm loss"][1] - 0.3
    launcher.run(run.argv, tmp_path / "again.txt")
    assert "attempting to finetune" in run.log.read_text()
    assert "attempting to finetune" not in (tmp_path / "again.txt").read_text()
    scalars = run.scalars()
    assert sorted(scalars["lm loss"]) == list(range(1, TOTAL_STEPS + 1))
    bags = [scalars["tst/bag size"][step] for step in (SWITCH, SWITCH + 1)]
    assert bags == [4, 1]


@pytest.mark.parametrize("model", ["Llama", "Llama, hybrid"])
def test_a_script_of_ones_own_trains_as_the_entry_point_does(
    launcher: Launcher, corpus: Path, tmp_path: Path, model: str
) -> None:
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "save_interval": 4,
    }
    ours, own = (
        SmallRun(corpus, tmp_path / name).with_(
            **SUPERPOSED, **layout, **MODELS[model], hidden_dropout=0.1
        )
        for name in ("ours", "own")
    )
    launcher.run(ours.argv, ours.log, 2)
    launcher.run(own.argv, own.log, 2, main="examples.own_model.pretrain_own_model:main")
    assert own.scalars()["lm loss"] == ours.scalars()["lm loss"]
    for step in (SWITCH, TOTAL_STEPS):
        assert_bit_equal(own.checkpoint(step), ours.checkpoint(step))


def test_an_embedding_of_ones_own_is_asked_in_both_phases(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    ours, own = (
        SmallRun(corpus, tmp_path / name).with_(**SUPERPOSED, save=None, eval_iters=0)
        for name in ("ours", "own")
    )
    launcher.run(ours.argv, ours.log)
    launcher.run(own.argv, own.log, main="tests.own_embedding:main")
    # Each token of a bag is embedded and then averaged: rounding apart, the same.
    assert own.scalars()["lm loss"] == pytest.approx(ours.scalars()["lm loss"], rel=1e-5)
    read = ours.scalars()["tst/data tokens"][TOTAL_STEPS]
    assert f"embedded {int(read)} tokens" in own.log.read_text()


def test_a_reset_that_the_script_would_not_do_is_refused(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = SmallRun(corpus, tmp_path / "run").with_(**SUPERPOSED, tst_reset_at_switch="optimizer")
    main = "examples.own_model.pretrain_own_model:main"
    assert launcher.wait(launcher.start(run.argv, run.log, main=main)) != [0]
    assert "--tst-reset-at-switch is optimizer, and this script does nothing" in run.log.read_text()
