"""What happens between the last step of a phase and the first of the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.step_hook import TrainingStep


def switch_phase(step: TrainingStep, schedule: SuperpositionSchedule) -> None:
    """Resets what the configuration says where bags end; everything else carries over.

    Args:
        step: the last step of a phase, done.
        schedule: phases of the run.
    """
    phase = schedule.phase_at(step.iteration)
    target = f"bags of {phase.bag_size}" if phase.is_superposed else "next-token prediction"
    print_rank_0(
        f"> switching to {target} after {step.iteration} steps "
        "(the training loss is another loss from here on)"
    )
    reset = "none" if phase.is_superposed else schedule.config.reset_at_switch
    if reset == "embeddings":
        reinitialize_embeddings(step.model, step.optimizer)
    elif reset == "optimizer":
        reset_optimizer_state(step.optimizer)


@torch.no_grad()
def reinitialize_embeddings(model: list[Any], optimizer: Any) -> None:
    """Draws the embedding and the output head anew from their initial distributions.

    Each tensor-parallel rank draws its own vocabulary shard; data-parallel replicas draw the same.
    Optimizer moments are kept, and so are the float32 master copies of all other weights.
    """
    redrawn: list[torch.nn.Parameter] = []
    for chunk in unwrap_model(model):
        with get_cuda_rng_tracker().fork():
            if chunk.pre_process:
                redrawn.append(chunk.embedding.word_embeddings.weight)
                _redraw(redrawn[-1], chunk.config.embedding_init_method)
            if chunk.post_process and not chunk.share_embeddings_and_output_weights:
                redrawn.append(chunk.output_layer.weight)
                _redraw(redrawn[-1], chunk.config.init_method)
    # Megatron can only reload all master weights, which would round the others to bf16.
    masters_redrawn = {id(getattr(parameter, "main_param", None)) for parameter in redrawn}
    others = [p for p in optimizer.get_parameters() if id(p) not in masters_redrawn]
    kept = [parameter.clone() for parameter in others]
    optimizer.reload_model_params()
    for parameter, value in zip(others, kept, strict=True):
        parameter.copy_(value)


def _redraw(parameter: torch.Tensor, initialize: Callable[[torch.Tensor], object]) -> None:
    if not isinstance(parameter, DTensor):
        initialize(parameter)
        return
    # Ranks that each draw their own rows would draw other numbers than one that draws them all.
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    initialize(whole)
    mesh, placements = parameter.device_mesh, parameter.placements
    parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers in a chain: that of a layer-wise one is a chain in another."""
    if (chain := getattr(optimizer, "chained_optimizers", None)) is None:
        yield optimizer
        return
    for part in chain:
        yield from _parts(part)


@torch.no_grad()
def reset_optimizer_state(optimizer: Any) -> None:
    """Clears moments and step counts of every parameter; master weights stay."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if name == "master_param" or not isinstance(value, torch.Tensor):
                    continue
                value.zero_()
        for group in part.optimizer.param_groups:
            step = group.get("step")
            # An Adam that CUDA graphs can capture counts in a tensor, which the graph reads.
            if isinstance(step, torch.Tensor):
                step.zero_()
            elif step is not None:
                group["step"] = 0
