"""One CPU process that parses, validates and builds as any rank of a cluster of GPUs.

What Megatron is told about the machine is replaced here and nowhere else: the compute capability,
the version of Transformer Engine where there is none, fusions of kernels whose absence Megatron
refuses by importing them, its optimizer, and the process group, which is torch's fake one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.training import get_megatron_ddp_config
from packaging.version import Version
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tst.common.command_parser import RaisingParser
from megatron_tst.common.platform import pose_connections
from megatron_tst.model.config import model_config_from_args
from megatron_tst.preflight.engine import (
    enter_recipes,
    forget_capability,
    has_transformer_engine,
    mark_split_weights,
)
from megatron_tst.preflight.stand_ins import stand_in_modules
from megatron_tst.settings.arguments import add_superposition_arguments
from megatron_tst.upstream.patches import replace

ASSUMED_ENGINE_VERSION = "2.17.1"
_FUSIONS = ("apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion")
_OPTIMIZER_TYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
LOCAL_MODULES: dict[str, Any] = {
    "transformer_impl": "local",
    "fp8": None,
    "fp8_param": False,
    "fp4": None,
    "fp4_param": False,
    "first_last_layers_bf16": False,
    "cpu_offloading": False,
    "use_grouped_gemm_for_shared_expert": False,
}
"""What a configuration must have for Megatron's own modules instead of Transformer Engine's."""


def assume_machine(compute_capability: tuple[int, int]) -> None:
    """Answers Megatron's questions about the machine as a cluster would."""
    torch.cuda.get_device_capability = lambda device=None: compute_capability
    torch.cuda.get_device_properties = _properties(compute_capability)
    if has_transformer_engine():
        forget_capability()
    else:
        replace("megatron.core.utils:_te_version", Version(ASSUMED_ENGINE_VERSION))


def _properties(compute_capability: tuple[int, int]) -> Callable[..., Any]:
    real = torch.cuda.get_device_properties(0)
    major, minor = compute_capability
    assumed = SimpleNamespace(
        name="assumed GPU",
        major=major,
        minor=minor,
        total_memory=real.total_memory,
        multi_processor_count=real.multi_processor_count,
    )
    return lambda device=None: assumed


def launch_parser() -> argparse.ArgumentParser:
    """Megatron's parser with ``--tst-*``, as the entry point has it on GPUs.

    It raises UsageError where argparse would exit.
    """
    parser = add_superposition_arguments(add_megatron_arguments(RaisingParser(allow_abbrev=False)))
    parser.set_defaults(rerun_mode="disabled")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], world_size: int
) -> argparse.Namespace:
    """What Megatron's ``parse_args`` makes of a command line on rank 0.

    Raises:
        UsageError: as argparse words it.
    """
    args = parser.parse_args(list(argv))
    args.rank, args.world_size = 0, world_size
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    return args


def validate(args: argparse.Namespace) -> None:
    """Megatron's validation, which changes the arguments; silent, and raises what it raises."""
    pose_connections(args)
    with _silence():
        validate_args(args)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def build_configuration(args: argparse.Namespace) -> Any:
    """The configuration of the model, which checks what ``validate_args`` does not.

    Args:
        args: validated, with ``padded_vocab_size``.

    Raises:
        Exception: whatever Megatron raises.
    """
    args = copy.copy(args)
    if not has_transformer_engine():
        for name in _FUSIONS:
            setattr(args, name, False)
        # Its optimizer too; memory is counted from the arguments as they were.
        args.use_precision_aware_optimizer = False
        for name in _OPTIMIZER_TYPES:
            setattr(args, name, torch.float32)
    with _silence():
        config = model_config_from_args(args)
        # Megatron sets up the generators by the argument, and only this check reads the field.
        config.transformer.use_te_rng_tracker = args.te_rng_tracker
        config.finalize()
        pretrain_cfg_container_from_args(args, config)
    return config


@dataclass(frozen=True)
class Stage:
    """The part of a model on one rank, its parameters on the meta device.

    Attributes:
        rank: as which it was built.
        pipeline_rank: of that rank.
        chunks: one, or one for each virtual stage.
        data_parallel_size: over which dense gradients are summed, context parallelism included.
        expert_data_parallel_size: over which gradients of experts are summed.
        data_parallel_rank: of the rank in the former.
        expert_data_parallel_rank: of the rank in the latter.
    """

    rank: int
    pipeline_rank: int
    chunks: list[torch.nn.Module]
    data_parallel_size: int
    expert_data_parallel_size: int
    data_parallel_rank: int
    expert_data_parallel_rank: int

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """All parameters of the rank, by name."""
        return [named for chunk in self.chunks for named in chunk.named_parameters()]


@contextlib.contextmanager
def as_rank(args: argparse.Namespace, rank: int) -> Iterator[ProcessGroupCollection]:
    """Megatron's process groups as ``rank`` has them, over torch's fake backend."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=args.world_size
    )
    try:
        with _silence():
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
                expert_model_parallel_size=args.expert_model_parallel_size,
                num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
                create_gloo_process_groups=False,
            )
        model_parallel_cuda_manual_seed(args.seed)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def check_recipes(args: argparse.Namespace, config: Any) -> None:
    """Has Transformer Engine, where it is installed, make the FP8 recipe of every layer.

    Args:
        args: validated.
        config: of ``build_configuration``.

    Raises:
        Exception: whatever Megatron and Transformer Engine raise.
    """
    if args.fp8 and has_transformer_engine():
        with as_rank(args, 0):
            enter_recipes(config.transformer)


def stage_ranks(args: argparse.Namespace) -> list[int]:
    """The first rank of every pipeline stage."""
    if args.pipeline_model_parallel_size == 1:
        return [0]
    with as_rank(args, 0) as groups:
        return [int(rank) for rank in torch.distributed.get_process_group_ranks(groups.pp)]


def build_stage(args: argparse.Namespace, config: Any, rank: int) -> Stage:
    """Builds, with Megatron's own builder, what a rank holds.

    Args:
        args: validated.
        config: of ``build_configuration``.
        rank: the rank to build as.

    Raises:
        Exception: whatever Megatron raises.
    """
    config = copy.deepcopy(config)
    transformer = config.transformer
    changes: dict[str, Any] = {
        "perform_initialization": False,
        "init_model_with_meta_device": True,
        # A kernel of apex; no parameter depends on it.
        "gradient_accumulation_fusion": False,
        # Recorded on a GPU.
        "cuda_graph_impl": "none",
        # Counted in elements; what is kept in FP8 follows from the arguments.
        "fp8_param": False,
    }
    if transformer.moe_token_dispatcher_type == "flex":
        # It has no parameters, and asks for a library of the cluster.
        changes["moe_token_dispatcher_type"] = "alltoall"
    if not has_transformer_engine():
        changes |= LOCAL_MODULES
    for name, value in changes.items():
        assert hasattr(transformer, name), name
        setattr(transformer, name, value)
    with as_rank(args, rank) as groups, _silence(), stand_in_modules():
        builder = config.get_builder_cls()(config)
        virtual = args.virtual_pipeline_model_parallel_size
        stages: list[int | None] = [None] if virtual is None else list(range(virtual))
        with torch.device("meta"):
            chunks = [builder.build_model(groups, vp_stage=stage) for stage in stages]
        if has_transformer_engine():
            for chunk in chunks:
                mark_split_weights(chunk)
        if args.bf16 or args.fp16:
            chunks = [Float16Module(transformer, chunk) for chunk in chunks]
        return Stage(
            rank=rank,
            pipeline_rank=groups.pp.rank(),
            chunks=chunks,
            data_parallel_size=groups.dp_cp.size(),
            expert_data_parallel_size=groups.expt_dp.size(),
            data_parallel_rank=groups.dp_cp.rank(),
            expert_data_parallel_rank=groups.expt_dp.rank(),
        )


def gradient_buffers(
    args: argparse.Namespace,
    stage: Stage,
    has_own_buffer: Callable[[torch.nn.Module, str, torch.nn.Parameter], bool] | None = None,
) -> list[Any]:
    """How Megatron lays the parameters of a rank out for its distributed optimizer.

    Args:
        args: validated.
        stage: what the rank holds.
        has_own_buffer: of a chunk, a name in it and the parameter: whether it lies apart from the
            others, as weights kept in FP8 do, which are built in bf16 here.

    Returns:
        Pairs of a key and a layout, by buffer, from Megatron's own function.
    """
    ddp = get_megatron_ddp_config(args)
    instances = args.num_distributed_optimizer_instances
    buffers = []
    for place, chunk in enumerate(stage.chunks):
        is_bucketed = args.overlap_grad_reduce and place == 0 and stage.pipeline_rank == 0
        groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                is_apart = has_own_buffer is not None and has_own_buffer(chunk, name, parameter)
                groups[is_apart].append(parameter)
        for parameters in groups.values():
            layout = DistributedOptimizer.compute_full_param_layout(
                parameters,
                _bucket_size(args, stage) if is_bucketed else None,
                stage.data_parallel_size // instances,
                ddp,
                expert_data_parallel_world_size=max(
                    stage.expert_data_parallel_size // instances, 1
                ),
            )
            buffers.extend(layout.layouts.items())
    return buffers


def _bucket_size(args: argparse.Namespace, stage: Stage) -> int:
    if args.ddp_num_buckets is not None:
        return sum(p.numel() for _, p in stage.parameters()) // int(args.ddp_num_buckets)
    return int(args.ddp_bucket_size or max(40_000_000, 1_000_000 * stage.data_parallel_size))
