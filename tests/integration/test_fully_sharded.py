"""Runs whose weights torch FSDP2 cuts: kills, resets, tools, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Check, SmallRun, assert_bit_equal, assert_faultless
from tests.survival import (
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

FSDP2: dict[str, Any] = {"use_torch_fsdp2": True}
# As the launch scripts save.
SAVES: dict[str, Any] = {
    "async_save": True,
    "use_persistent_ckpt_worker": True,
    "ckpt_fully_parallel_load": True,
    "ckpt_assume_constant_structure": True,
    "dist_ckpt_strictness": "log_all",
}


@pytest.fixture(scope="module")
def pair(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Two processes that were not interrupted."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("pair"))
    run = run.with_(**SETTINGS, **FSDP2, **SAVES, bf16=True)
    launcher.run(run.argv, run.log, world_size=2)
    return run


def test_a_killed_run_continues_bit_equal(
    launcher: Launcher, pair: SmallRun, tmp_path: Path
) -> None:
    run = pair.with_(tmp_path)
    environment = {"STOP_AFTER": str(SWITCH + 2)}
    started = launcher.start(run.argv, run.log, 2, main=MAIN, environment=environment)
    wait_until_stopped(started)
    kill(launcher, started)
    # The one before, where the kill was faster than the writer of the checkpoint.
    assert last_checkpoint(run) in (SETTINGS["save_interval"], SWITCH)
    launcher.run(run.argv, run.log, 2)
    assert_bit_equal(run.checkpoint(TOTAL), pair.checkpoint(TOTAL))


def test_tools_read_its_checkpoints(launcher: Launcher, pair: SmallRun, tmp_path: Path) -> None:
    assert_faultless(*(pair.checkpoint_folder(step) for step in (SWITCH, TOTAL)))
    arguments = ["--checkpoint", str(pair.folder / "checkpoints"), "--verify"]
    arguments += ["--tokenizer", f"{pair.corpus}-tokenizer", "--output", str(tmp_path / "model")]
    main = "megatron_tst.commands.convert_megatron_to_hf:main"
    assert "within the tolerance" in launcher.run(arguments, tmp_path / "log.txt", main=main).text


def test_embeddings_are_redrawn_as_by_one_process(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "tst_bag_size": 4,
        "tst_steps": 1,
        "train_iters": 3,
        "eval_iters": 0,
    }
    one = SmallRun(corpus, tmp_path / "one").with_(**settings, tst_reset_at_switch="embeddings")
    two = one.with_(tmp_path / "two", **FSDP2)
    for ranks, run in enumerate((one, two), start=1):
        launcher.run(run.argv, run.log, ranks)
    losses = two.scalars()["lm loss"]
    # fp32: sums run in another order.
    assert losses == pytest.approx(one.scalars()["lm loss"], rel=1e-6)
    # It was redrawn.
    assert losses[2] > losses[1] - 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "they would have unequal parts of the 256 rows of embedding.word_embeddings.weight"),
        (
            {"hidden_size": 48, "ffn_hidden_size": 48, "make_vocab_size_divisible_by": 3},
            "decoder.layers.0.mlp.linear_fc1.weight holds two projections",
        ),
    ],
    ids=["unequal", "gated"],
)
def test_shards_that_cannot_be_saved_are_refused(
    launcher: Launcher, small_run: SmallRun, settings: dict[str, Any], message: str
) -> None:
    run = small_run.with_(**FSDP2, **settings, tst_bag_size=4, tst_steps=2, global_batch_size=6)
    started = launcher.start(run.argv, run.log, 3)
    assert launcher.wait(started) == [2, 2, 2]
    assert f"cannot be saved: {message}" in started.text
    assert not (run.folder / "checkpoints").exists()


def test_what_does_not_work_with_it(check: Check, small_run: SmallRun) -> None:
    experts: dict[str, Any] = {
        "num_experts": 4,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    refused: dict[str, dict[str, Any]] = {
        "--ckpt-format torch_dcp: Megatron 0.19.2 cannot load": {"ckpt_format": "torch_dcp"},
        "--expert-tensor-parallel-size 1 and --tensor-model-parallel-size 2: ": {
            **experts,
            "expert_tensor_parallel_size": 1,
        },
        "--moe-grouped-gemm: ": {"num_experts": 4, "moe_grouped_gemm": True},
        "--log-params-norm: ": {"log_params_norm": True},
    }
    plain = small_run.with_(**FSDP2)
    messages = check([plain.with_(**settings) for settings in refused.values()])
    for message, expected in zip(messages, refused, strict=True):
        assert message is not None
        assert message.startswith(f"--use-torch-fsdp2 does not work with {expected}"), message
    bags: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": 2}
    assert check([plain.with_(**bags), plain.with_(**bags, **experts)]) == [None, None]
