"""Ordinary Megatron flags on the CPU platform."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.integration.layouts import LATENT_ATTENTION
from tests.runs import TOTAL_STEPS, SmallRun, assert_faultless
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

# What large runs set, in bundles: each run costs seconds.
BUNDLES: dict[str, dict[str, Any]] = {
    "distributed optimizer": {
        "bf16": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "manual_gc": True,
        "manual_gc_interval": 5,
        "async_save": True,
        "use_persistent_ckpt_worker": True,
        "ckpt_assume_constant_structure": True,
        "save_interval": 4,
        "log_throughput": True,
        "log_memory_to_tensorboard": True,
        "log_device_memory_used": True,
        "log_params_norm": True,
        "log_num_zeros_in_grad": True,
        "exit_signal_handler": True,
        "empty_unused_memory_level": 2,
    },
    "profile": {
        "profile": True,
        "use_pytorch_profiler": True,
        "profile_step_start": 3,
        "profile_step_end": 5,
        "recompute_granularity": "selective",
        "log_timers_to_tensorboard": True,
        "timing_log_level": 2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "rerun_mode": "validate_results",
    },
    "data, evaluation and schedules": {
        "eval_global_batch_size": 2,
        "eval_micro_batch_size": 1,
        "no_mmap_bin_files": True,
        "num_dataset_builder_threads": 2,
        "mid_level_dataset_surplus": 0.01,
        "padded_vocab_size": 512,
        "allow_ambiguous_pad_tokens": True,
        "log_progress": True,
        "save_interval": 4,
        "save_retain_interval": 8,
        "verify_integrity": True,
        "log_validation_ppl_to_tensorboard": True,
        "log_world_size_to_tensorboard": True,
        "log_memory_interval": 2,
        "tensorboard_log_interval": 1,
        "decoupled_lr": 2e-3,
        "decoupled_min_lr": 1e-4,
        "lr_warmup_init": 1e-4,
        "weight_decay": None,
        "start_weight_decay": 0.01,
        "end_weight_decay": 0.1,
        "weight_decay_incr_style": "linear",
        "clip_grad": 0.5,
        "adam_beta1": 0.8,
        "adam_eps": 1e-7,
        "init_method_std": 0.03,
        "embedding_init_method_std": 0.01,
        "norm_epsilon": 1e-6,
        "rotary_base": 5000,
        "rotary_percent": 0.5,
        "kv_channels": 16,
        "add_qkv_bias": True,
    },
    "unusual layers": {
        "bf16": True,
        "fp32_residual_connection": True,
        "qk_l2_norm": True,
        "window_size": "8,0",
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm", "core_attn"],
    },
}


def assert_it_learned(run: SmallRun) -> None:
    losses = run.scalars()["lm loss"]
    assert sorted(losses) == list(range(1, TOTAL_STEPS + 1))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[TOTAL_STEPS] < losses[1] - 0.3


@pytest.mark.parametrize("bundle", BUNDLES)
def test_flags_of_large_runs_work(launcher: Launcher, small_run: SmallRun, bundle: str) -> None:
    run = small_run.with_(**BUNDLES[bundle], tst_bag_size=4, tst_steps=5)
    launcher.run(run.argv, run.log)
    assert_it_learned(run)
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))
    if bundle == "distributed optimizer":
        scalars = run.scalars()
        assert min(scalars["mem-allocated-bytes"].values()) > 1e6
        assert (run.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == (
            str(TOTAL_STEPS)
        )


def test_replicas_agree_under_overlapped_reduction(launcher: Launcher, small_run: SmallRun) -> None:
    """Megatron compares the weights of the replicas itself, and stops where they differ."""
    run = small_run.with_(
        bf16=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        check_weight_hash_across_dp_replicas_interval=4,
    )
    launcher.run(run.argv, run.log, world_size=2)
    assert_it_learned(run)
    assert run.log.read_text().count("Weight hashes match after") >= TOTAL_STEPS // 4
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))


def test_sequence_parallelism_changes_the_layout_only(
    launcher: Launcher, small_run: SmallRun
) -> None:
    """A run that continues under sequence parallelism, through the end of phase 1."""
    saved_step, steps = 3, 6
    run = small_run.with_(
        tensor_model_parallel_size=2,
        tst_bag_size=4,
        tst_steps=4,
        train_iters=steps,
        eval_iters=0,
        save_interval=saved_step,
    )
    launcher.run(run.argv, run.log, world_size=2)
    continued = run.with_(
        run.folder / "continued",
        sequence_parallel=True,
        load=run.folder / "checkpoints",
        ckpt_step=saved_step,
    )
    launcher.run(continued.argv, continued.log, world_size=2)
    losses = continued.scalars()["lm loss"]
    assert sorted(losses) == list(range(saved_step + 1, steps + 1))
    expected = run.scalars()["lm loss"]
    # float32; only the order of sums over positions differs.
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-4)
    # Each rank sees half of the positions: the weights of the norms agree only if Megatron adds up
    # their gradients. Adam turns a rounding of a tiny gradient into a visible step.
    for name, weight in continued.checkpoint(steps).items():
        if "norm" in name:
            torch.testing.assert_close(weight, run.checkpoint(steps)[name], rtol=0, atol=1e-4)


def test_latent_attention_continues_at_other_layouts(
    launcher: Launcher, small_run: SmallRun
) -> None:
    saved_step, steps = 3, 6
    run = small_run.with_(
        **LATENT_ATTENTION | {"v_head_dim": 16},
        tst_bag_size=4,
        tst_steps=4,
        train_iters=steps,
        eval_iters=0,
        save_interval=saved_step,
    )
    launcher.run(run.argv, run.log)
    expected = {step: loss for step, loss in run.scalars()["lm loss"].items() if step > saved_step}
    layouts: list[dict[str, Any]] = [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"context_parallel_size": 2},
    ]
    for layout in layouts:
        continued = run.with_(
            run.folder / next(iter(layout)),
            **layout,
            load=run.folder / "checkpoints",
            save=None,
            ckpt_step=saved_step,
        )
        launcher.run(continued.argv, continued.log, world_size=2)
        # float32; only the order of sums differs.
        assert continued.scalars()["lm loss"] == pytest.approx(expected, rel=1e-4)
