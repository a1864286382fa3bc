"""Checkpoints have the master weight and the moments of every element that the ranks hold.

Gradient buffers of many buckets whose ends are padded, which Megatron 0.19.2 saves wrongly in one
format and does not save in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kept_optimizer import MAIN, by_bucket, by_parameter, kept
from tests.runs import SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SAVED, STEPS = 2, 4
SETTINGS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 40,
    "ffn_hidden_size": 80,
    "tst_bag_size": 4,
    "tst_steps": SAVED,
    "train_iters": STEPS,
    "save_interval": SAVED,
    "eval_iters": 1,
    "micro_batch_size": 1,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 3000,
}
FULLY_RESHARDABLE: dict[str, Any] = {"dist_ckpt_optim_fully_reshardable": True}
# Of two for each of two ranks: their gradients have a buffer of their own, shared by two more.
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
}
# A bucket of the first stage ends where the shared embedding would begin: 24 elements behind its
# last parameter, and 64 before its padded end.
TIED: dict[str, Any] = {
    "untie_embeddings_and_output_weights": None,
    "pipeline_model_parallel_size": 2,
    "ddp_bucket_size": 5000,
}
# Ends of up to 65,535 elements: all of a bucket lies on the first rank.
WIDE: dict[str, Any] = {"ddp_pad_buckets_for_high_nccl_busbw": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (2, FULLY_RESHARDABLE),
    "experts in bf16": (4, {**FULLY_RESHARDABLE, **EXPERTS, "bf16": True}),
    "tied in bf16, by bucket": (4, {**TIED, "bf16": True}),
    "experts with wide ends, by bucket": (4, {**EXPERTS, **WIDE}),
}


@pytest.fixture(scope="module")
def saved(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SmallRun]:
    """Runs that were not interrupted, with what their ranks held; made when needed."""
    runs: dict[str, SmallRun] = {}

    def get(case: str, **environment: str) -> SmallRun:
        name = f"{case} {environment}"
        if name not in runs:
            world_size, arguments = CASES[case]
            run = SmallRun(corpus, tmp_path_factory.mktemp("saved")).with_(
                **{**SETTINGS, **arguments}
            )
            environment["KEEP_STATE"] = str(run.folder / "kept")
            launcher.run(run.argv, run.log, world_size, main=MAIN, environment=environment)
            runs[name] = run
        return runs[name]

    return get


def differences(run: SmallRun, case: str, step: int) -> list[str]:
    """What a checkpoint has otherwise than the ranks had it."""
    pieces = kept(run.folder / "kept", step)
    assert len({piece["bucket"] for piece in pieces if piece["bucket_padding"]}) > 1
    arguments = CASES[case][1]
    if "dist_ckpt_optim_fully_reshardable" in arguments:
        expected = by_parameter(pieces, experts=2)
    else:
        expected = by_bucket(pieces)
    actual = {name: value for name, value in run.checkpoint(step).items() if "optimizer." in name}
    assert actual.keys() == expected.keys()
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_what_the_ranks_held(saved: Callable[..., SmallRun], case: str) -> None:
    run = saved(case)
    for step in (SAVED, STEPS):
        assert not differences(run, case, step)


@pytest.mark.parametrize("case", CASES)
def test_a_resume_goes_on_with_the_same_bits(
    launcher: Launcher, saved: Callable[..., SmallRun], tmp_path: Path, case: str
) -> None:
    expected = saved(case)
    load = {"load": expected.folder / "checkpoints", "ckpt_step": SAVED}
    run = expected.with_(tmp_path, **load)
    launcher.run(run.argv, run.log, CASES[case][0])
    assert "loading distributed checkpoint" in run.log.read_text()
    assert_bit_equal(run.checkpoint(STEPS), expected.checkpoint(STEPS))


def test_a_checkpoint_continues_at_another_layout(
    launcher: Launcher, saved: Callable[..., SmallRun], tmp_path: Path
) -> None:
    expected = saved("dense")
    load = {"load": expected.folder / "checkpoints", "ckpt_step": SAVED}
    run = expected.with_(tmp_path, **load, tensor_model_parallel_size=2)
    launcher.run(run.argv, run.log, 2)
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        actual, losses = run.scalars()[tag], expected.scalars()[tag]
        # fp32: sums run in another order.
        assert actual == pytest.approx({step: losses[step] for step in actual}, rel=1e-5), tag


def test_megatron_alone_saves_other_values(saved: Callable[..., SmallRun]) -> None:
    """Else the comparison would find nothing."""
    run = saved("dense", UNMENDED_OPTIMIZER="1")
    assert "padded with zeros" in run.log.read_text()
    wrong = differences(run, "dense", SAVED)
    assert "optimizer.state.param.embedding.word_embeddings.weight" in wrong
    assert "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight" in wrong
