"""Optimizers of the package emerging-optimizers, through the switch and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import SmallRun, assert_bit_equal, assert_faultless
from tests.survival import SETTINGS, SWITCH, TOTAL
from tests.zygote import Launcher

pytest.importorskip("emerging_optimizers", reason="emerging-optimizers is not installed")
pytestmark = pytest.mark.slow

SAVED = 3
MUON: dict[str, Any] = {
    **SETTINGS,
    "optimizer": "muon",
    # Its default lets CPUs with bf16 multiply in it.
    "muon_fp32_matmul_prec": "high",
    # It differs by rank.
    "hidden_dropout": 0,
}
LAYER_WISE: dict[str, Any] = {
    **MUON,
    "use_distributed_optimizer": True,
    "bf16": True,
    "num_layers": None,
    "hybrid_layer_pattern": "*-*-",
}


def trained(launcher: Launcher, run: SmallRun, world_size: int = 1) -> SmallRun:
    launcher.run(run.argv, run.log, world_size)
    return run


@pytest.fixture(scope="module")
def muon(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(corpus, tmp_path_factory.mktemp("muon"))
    return trained(launcher, run.with_(**MUON, tst_reset_at_switch="optimizer"))


def states(run: SmallRun) -> dict[str, set[str]]:
    """What the optimizer keeps of each weight, by its name."""
    found: dict[str, set[str]] = {}
    for name in run.checkpoint(TOTAL):
        if "optimizer.state." in name:
            kind, weight = name.partition("optimizer.state.")[2].split(".", 1)
            found.setdefault(weight, set()).add(kind)
    return found


def test_embedding_and_output_layer_are_left_to_adam(muon: SmallRun) -> None:
    of_weights = states(muon)
    for weight, kinds in of_weights.items():
        is_matrix = "norm" not in weight and not weight.startswith(("embedding", "output_layer"))
        assert kinds == ({"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq"}), weight
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} < of_weights.keys()


def test_the_reset_reaches_both_optimizers(launcher: Launcher, muon: SmallRun) -> None:
    """Moments at the switch are zero, and differ from zero again behind it."""
    for step in (SWITCH, TOTAL):
        moments = [value for name, value in muon.checkpoint(step).items() if "state." in name]
        assert moments
        assert all(bool(value.any()) == (step == TOTAL) for value in moments)


def test_two_processes_train_as_one(launcher: Launcher, muon: SmallRun, tmp_path: Path) -> None:
    two = trained(launcher, muon.with_(tmp_path), 2)
    # fp32: the gradients of two processes are summed in another order.
    assert two.scalars()["lm loss"] == pytest.approx(muon.scalars()["lm loss"], rel=1e-5)


def test_tensor_parallel_ranks_train_as_one(
    launcher: Launcher, muon: SmallRun, tmp_path: Path
) -> None:
    """With the mode that does not orthogonalize each shard by itself."""
    # Stages and ranks draw their weights from seeds of their own.
    start = {"pretrained_checkpoint": muon.folder / "checkpoints", "muon_tp_mode": "distributed"}
    one = trained(launcher, muon.with_(tmp_path / "one", **start))
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    two = trained(launcher, one.with_(tmp_path / "two", **layout), 2)
    # fp32: sums run in another order, and five iterations of Newton and Schulz magnify that.
    assert two.scalars()["lm loss"] == pytest.approx(one.scalars()["lm loss"], rel=5e-5)


@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_a_resumed_run_ends_with_the_same_bits(
    launcher: Launcher, muon: SmallRun, tmp_path: Path, optimizer: str
) -> None:
    whole = muon
    if optimizer != "muon":
        whole = trained(launcher, muon.with_(tmp_path / "whole", optimizer=optimizer))
    resumed = muon.with_(tmp_path / "resumed", optimizer=optimizer, ckpt_step=SAVED)
    trained(launcher, resumed.with_(load=whole.folder / "checkpoints"))
    assert_bit_equal(resumed.checkpoint(TOTAL), whole.checkpoint(TOTAL))
    assert_faultless(*sorted((whole.folder / "checkpoints").glob("iter_*")))


def test_layer_wise_over_two_processes(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    one = SmallRun(corpus, tmp_path / "one").with_(
        **{**LAYER_WISE, "use_distributed_optimizer": None}
    )
    trained(launcher, one)
    two = trained(launcher, SmallRun(corpus, tmp_path / "two").with_(**LAYER_WISE), 2)
    # bf16: collectives round partial sums.
    assert two.scalars()["lm loss"] == pytest.approx(one.scalars()["lm loss"], rel=5e-4)
    resumed = two.with_(tmp_path / "resumed", load=two.folder / "checkpoints", ckpt_step=SAVED)
    trained(launcher, resumed, 2)
    assert_bit_equal(resumed.checkpoint(TOTAL), two.checkpoint(TOTAL))
    assert_faultless(*sorted((two.folder / "checkpoints").glob("iter_*")))
    other = resumed.with_(use_distributed_optimizer=None)
    started = launcher.start(other.argv, tmp_path / "other.txt")
    assert launcher.wait(started) == [2]
    assert "was saved with --use-distributed-optimizer, and this command is without" in started.text
