"""Reports the progress of a run to the console, TensorBoard and W&B."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_last

from megatron_tst.common.atomic_files import write_json
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.metrics import StepClock

_SETTINGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "micro_batch_size",
    "train_iters",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "lr_wsd_decay_style",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "bf16",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_router_topk",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
    "data_path",
    "split",
    "tokenizer_type",
    "tokenizer_model",
    "eval_interval",
    "eval_iters",
    "eval_global_batch_size",
    "seed",
    "transformer_impl",
    "tst_loss_impl",
)


class ProgressReporter:
    """Logs phase, data tokens, speed and loss by offset on the steps that Megatron logs.

    Args:
        schedule: phases of the run.
        clock: time spent in training steps.
        offset_loss_meter: loss by offset in the bag of the current step.
    """

    def __init__(
        self,
        schedule: SuperpositionSchedule,
        clock: StepClock,
        offset_loss_meter: OffsetLossMeter,
    ) -> None:
        self.schedule = schedule
        self.clock = clock
        self.offset_loss_meter = offset_loss_meter
        self._last_seconds = clock.seconds
        self._last_iteration: int | None = None

    def report(self, iteration: int, args: Namespace) -> None:
        """Reports the step that was just done; one small all-reduce on logged steps with bags."""
        if self._last_iteration is None:
            self._last_iteration = iteration - 1
        if iteration % args.log_interval != 0:
            return
        offset_losses: list[float] = []
        if mpu.is_pipeline_last_stage():
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            offset_losses = self.offset_loss_meter.reduce(group)
        scalars = self._scalars(iteration)
        _write_scalars(iteration, scalars, offset_losses)
        print_rank_last(self._console_line(iteration, scalars, offset_losses))
        self._last_iteration, self._last_seconds = iteration, self.clock.seconds

    def _scalars(self, iteration: int) -> dict[str, float]:
        assert self._last_iteration is not None
        schedule, seconds = self.schedule, self.clock.seconds
        data_tokens = schedule.data_tokens(iteration)
        new_tokens = data_tokens - schedule.data_tokens(self._last_iteration)
        elapsed = max(seconds - self._last_seconds, 1e-9)
        return {
            "tst/bag size": schedule.bag_size_at(iteration - 1),
            "tst/data tokens": data_tokens,
            "tst/equivalent tokens": schedule.equivalent_tokens(iteration),
            "tst/data tokens per second": new_tokens / elapsed,
            "tst/seconds": seconds,
        }

    def _console_line(
        self, iteration: int, scalars: dict[str, float], offset_losses: list[float]
    ) -> str:
        parts = [
            f" step {iteration:8d}/{self.schedule.total_steps:8d}",
            f"phase: {self.schedule.phase_at(iteration - 1).name}",
            f"bag size: {scalars['tst/bag size']:.0f}",
            f"data tokens: {scalars['tst/data tokens']:.4g}",
            f"equivalent tokens: {scalars['tst/equivalent tokens']:.4g}",
            f"data tokens per second: {scalars['tst/data tokens per second']:.4g}",
        ]
        if offset_losses:
            parts.append("loss by offset: " + " ".join(f"{loss:.3f}" for loss in offset_losses))
        return " | ".join(parts)


def _write_scalars(iteration: int, scalars: dict[str, float], offset_losses: list[float]) -> None:
    by_offset = {f"tst/loss at offset {i}": loss for i, loss in enumerate(offset_losses, start=1)}
    values = {**scalars, **by_offset}
    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)


def count_parameters(model: list[torch.nn.Module]) -> int:
    """Parameters of the whole model, each shard and each copy counted once.

    Args:
        model: model chunks of this rank. Two all-reduces of one number over all ranks that share
            the model.
    """
    dense = expert = 0
    for parameter in (p for chunk in model for p in chunk.parameters()):
        is_copy = getattr(parameter, "shared", False)
        if is_copy or not param_is_not_tensor_parallel_duplicate(parameter):
            continue
        if getattr(parameter, "allreduce", True):
            dense += parameter.numel()
        else:
            expert += parameter.numel()
    counts = torch.tensor([dense, expert], device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts[:1], group=mpu.get_model_parallel_group())
    torch.distributed.all_reduce(
        counts[1:], group=mpu.get_expert_tensor_model_pipeline_parallel_group()
    )
    return int(counts.sum())


def write_run_description(
    args: Namespace,
    schedule: SuperpositionSchedule,
    parameters: int,
    losses: Mapping[str, str],
    cpu_platform: Mapping[str, str],
) -> None:
    """Writes what identifies the run to ``tst_run.json`` in the TensorBoard folder, on one rank.

    Args:
        args: Megatron's.
        schedule: phases of the run.
        parameters: of the whole model.
        losses: what computes them, of ``losses_of_run``.
        cpu_platform: how the CPU platform computes; empty on a GPU.
    """
    if not get_tensorboard_writer():
        return
    description = {
        "superposition": schedule.config.to_dict(),
        "phases": [phase.record() for phase in schedule.phases],
        "switch_step": schedule.switch_step,
        "total_steps": schedule.total_steps,
        "batch_sizes": schedule.batch_sizes.entries,
        "sequence_length": schedule.sequence_length,
        "text_share": schedule.text_share,
        "text_shares": schedule.text_shares,
        "data_budget": args.tst_data_budget,
        "parameters": parameters,
        "seed": args.seed,
        "settings": {name: getattr(args, name, None) for name in _SETTINGS},
        "losses": dict(losses),
        "commit": _commit(),
        "machine": _machine(),
        "cpu_platform": dict(cpu_platform),
        "command": " ".join(sys.argv),
        # All of them: tst trace builds the datasets of the run from them.
        "arguments": {name: value for name, value in vars(args).items() if _is_plain(value)},
    }
    target = Path(args.tensorboard_dir) / "tst_run.json"
    write_json(target, description, default=str)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerator": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "megatron": version("megatron-core"),
        "python": platform.python_version(),
    }
