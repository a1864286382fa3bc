"""Megatron arguments that do not go together with superposition, or with this entry point."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.arguments import bags_flag, has_bags
from megatron_tst.settings.checkpoint_arguments import checkpoint_conflicts
from megatron_tst.settings.host_modes import mode_conflicts
from megatron_tst.settings.model_conflicts import model_conflicts
from megatron_tst.settings.multi_token import multi_token_conflicts
from megatron_tst.settings.optimizer_arguments import optimizer_conflicts


@dataclass(frozen=True)
class _Conflict:
    """A Megatron argument that is refused.

    Attributes:
        flag: the argument.
        reason: why, as the end of a sentence.
        is_refused: whether a value of it is.
        at_any_bag_size: whether a run without superposition cannot have it either, because this
            entry point would silently leave out what it asks for.
    """

    flag: str
    reason: str
    is_refused: Callable[[Any], bool] = bool
    at_any_bag_size: bool = False

    def value(self, args: argparse.Namespace) -> Any:
        return getattr(args, self.flag.removeprefix("--").replace("-", "_"))


_OTHER_BATCHES = "its batches are not bags of tokens"
_DOCUMENT_BOUNDARIES = "a bag may hold tokens of two documents"
_DOCUMENT_MASKING = (
    "(--dataloader-inter-document-masking with --tst-document-boundary align keeps them apart)"
)
_CONFLICTS = (
    _Conflict(
        "--sft",
        "it reads conversations, each with a length and a loss mask of its own, and no stream of "
        "text",
        at_any_bag_size=True,
    ),
    _Conflict(
        "--fim-data",
        "Megatron draws its permutations from a random state that no checkpoint holds, so that a "
        "resume would read other text",
        at_any_bag_size=True,
    ),
    _Conflict("--perform-rl-step", _OTHER_BATCHES, at_any_bag_size=True),
    _Conflict("--reset-attention-mask", f"{_DOCUMENT_BOUNDARIES} {_DOCUMENT_MASKING}"),
    _Conflict("--reset-position-ids", f"{_DOCUMENT_BOUNDARIES} {_DOCUMENT_MASKING}"),
    _Conflict(
        "--hybrid-context-parallel",
        "it gives each document a number of ranks of its own, and the batches here go to all ranks "
        "alike",
        at_any_bag_size=True,
    ),
    _Conflict(
        "--cross-entropy-fusion-impl",
        "it overwrites bf16 logits (native does not)",
        lambda name: name == "te",
    ),
    _Conflict(
        "--cuda-graph-impl",
        "Megatron replays the shapes and the number of the first micro-batches, and nothing that "
        "the forward step measures (local and transformer_engine capture layers only, and work)",
        lambda name: name == "full_iteration",
        at_any_bag_size=True,
    ),
    _Conflict(
        "--dataloader-type",
        "samples must be read in order for each token to be read once (single does)",
        lambda name: name not in (None, "single"),
    ),
    _Conflict(
        "--ckpt-format",
        "only the settings in torch_dist checkpoints are compared on a resume (--load takes "
        "others with --finetune)",
        lambda name: name != "torch_dist",
    ),
    _Conflict(
        "--rampup-batch-size",
        "Megatron ignores it (--step-batch-size-schedule ramps the batch size)",
    ),
    _Conflict(
        "--phase-transition-iterations",
        "it restarts and reshuffles the data, and the switch happens inside the run",
    ),
    _Conflict(
        "--use-megatron-fsdp",
        "Megatron saves it as fsdp_dtensor only, which no resume is compared with and no tool "
        "reads (--use-torch-fsdp2 works)",
    ),
    _Conflict(
        "--logits-load-dir", "cached teacher logits belong to single tokens", at_any_bag_size=True
    ),
)


def refuse_conflicting_arguments(args: argparse.Namespace) -> None:
    """Refuses Megatron arguments that superposition, or this entry point, does not work with.

    Raises:
        UsageError: the first of ``conflicts``.
    """
    for message in conflicts(args):
        raise UsageError(message)


def conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Megatron arguments that superposition, or this entry point, does not work with.

    Returns:
        Messages, each naming the argument, its value, the reason and the remedy.
    """
    is_superposed = has_bags(args)
    for conflict in _CONFLICTS:
        if conflict.is_refused(conflict.value(args)) and (
            is_superposed or conflict.at_any_bag_size
        ):
            yield _described(conflict, args)
    if args.async_save and not args.use_persistent_ckpt_worker:
        yield "--async-save without --use-persistent-ckpt-worker is turned off by Megatron: add it."
    if args.overlap_moe_expert_parallel_comm and args.hybrid_layer_pattern:
        yield (
            "--overlap-moe-expert-parallel-comm does not work with --hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern}: Megatron's HybridModel has no such schedule. Remove one."
        )
    if args.dataloader_inter_document_masking:
        yield from _with_document_masking(args)
    yield from multi_token_conflicts(args)
    yield from mode_conflicts(args)
    yield from checkpoint_conflicts(args)
    yield from optimizer_conflicts(args)
    yield from model_conflicts(args)
    if args.tst_loss_impl == "linear":
        yield from _with_linear_loss(args)
    if args.use_torch_fsdp2:
        yield from _with_torch_fsdp2(args)
    if args.cross_entropy_loss_fusion and args.tst_loss_impl in ("torch", "triton", "linear"):
        yield (
            f"--cross-entropy-loss-fusion does not work with --tst-loss-impl {args.tst_loss_impl}: "
            "each asks for another loss of single targets. Remove one, or use --tst-loss-impl host."
        )
    if is_superposed and args.tst_reset_at_switch == "embeddings":
        yield from _with_embedding_reset(args)


def _described(conflict: _Conflict, args: argparse.Namespace) -> str:
    value = conflict.value(args)
    setting = conflict.flag if value is True else f"{conflict.flag} {_written(value)}"
    if conflict.at_any_bag_size:
        context, remedy = "megatron_tst.pretrain", "run Megatron's pretrain_gpt.py"
    else:
        context = bags_flag(args)
        flag = context.partition(" ")[0]
        remedy = "use --tst-bag-size 1" if flag == "--tst-bag-size" else flag
    return f"{setting} does not work with {context}: {conflict.reason}. Remove it, or {remedy}."


def _with_document_masking(args: argparse.Namespace) -> Iterator[str]:
    flag = "--dataloader-inter-document-masking"
    if has_bags(args) and args.tst_document_boundary != "align":
        yield (
            f"{flag} does not work with {bags_flag(args)} and "
            f"--tst-document-boundary {args.tst_document_boundary}: {_DOCUMENT_BOUNDARIES}. Use "
            "--tst-document-boundary align."
        )
    stages, micro_batch = args.pipeline_model_parallel_size, args.micro_batch_size
    refused = {
        f"--context-parallel-size {args.context_parallel_size}": (
            args.context_parallel_size > 1,
            "Megatron cuts the sequence into two chunks a rank, and its rotary positions and "
            "attention expect two of each document, which no text has the lengths for",
        ),
        f"--pipeline-model-parallel-size {stages} and --micro-batch-size {micro_batch}": (
            stages > 1 and micro_batch > 1,
            "Megatron's stages do not hand on packed samples (--micro-batch-size 1 works)",
        ),
        "--overlap-moe-expert-parallel-comm": (
            args.overlap_moe_expert_parallel_comm,
            "its schedule is not told where documents begin",
        ),
        f"--moe-router-load-balancing-type seq_aux_loss, --sequence-parallel and "
        f"--micro-batch-size {micro_batch}": (
            "seq_aux_loss" in _written(args.moe_router_load_balancing_type).split()
            and args.sequence_parallel
            and args.tensor_model_parallel_size > 1
            and micro_batch > 1,
            "Megatron does not find the samples in a part of a packed sequence "
            "(--micro-batch-size 1 works)",
        ),
    }
    for setting, (is_set, reason) in refused.items():
        if is_set:
            yield f"{flag} does not work with {setting}: {reason}. Remove one of them."


def _with_torch_fsdp2(args: argparse.Namespace) -> Iterator[str]:
    tensor = args.tensor_model_parallel_size
    of_experts = args.expert_tensor_parallel_size
    refused = {
        "--ckpt-format torch_dcp": (
            args.ckpt_format == "torch_dcp",
            "Megatron 0.19.2 cannot load the state of an optimizer from it (torch_dist works)",
        ),
        f"--expert-tensor-parallel-size {of_experts} and --tensor-model-parallel-size {tensor}": (
            args.num_experts and of_experts not in (None, tensor),
            "it shards and adds up experts over the ranks of all other weights",
        ),
        "--moe-grouped-gemm": (
            args.moe_grouped_gemm,
            "Megatron saves the shards of grouped experts as copies of one",
        ),
        "--log-params-norm": (
            args.log_params_norm,
            "Megatron would log the norm of the shards of one rank",
        ),
    }
    for setting, (is_set, reason) in refused.items():
        if is_set:
            yield f"--use-torch-fsdp2 does not work with {setting}: {reason}. Remove one of them."


def _with_linear_loss(args: argparse.Namespace) -> Iterator[str]:
    objective = args.tst_objective
    refused = {
        "--fp8-output-proj": (
            args.fp8_output_proj,
            "Transformer Engine computes the output layer (--tst-loss-impl auto works)",
        ),
        f"--tst-objective {objective}": (objective != "mce", "it needs the logits as a whole"),
        "--overlap-moe-expert-parallel-comm": (
            args.overlap_moe_expert_parallel_comm,
            "its schedule runs the output layer by itself",
        ),
        "--defer-embedding-wgrad-compute": (
            args.defer_embedding_wgrad_compute,
            "the gradient of the weight is computed with the loss",
        ),
        **{
            flag: (is_set, "the weight is whole in its own layer only (--tst-loss-impl auto works)")
            for flag, is_set in (
                ("--use-megatron-fsdp", args.use_megatron_fsdp),
                ("--use-torch-fsdp2", args.use_torch_fsdp2),
            )
        },
    }
    for setting, (is_set, reason) in refused.items():
        if is_set:
            yield f"--tst-loss-impl linear does not work with {setting}: {reason}. Remove one."


def _with_embedding_reset(args: argparse.Namespace) -> Iterator[str]:
    is_tied_across_stages = (
        not args.untie_embeddings_and_output_weights and args.pipeline_model_parallel_size > 1
    )
    refused = {
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--data-parallel-random-init": args.data_parallel_random_init,
        "--pipeline-model-parallel-size with tied embeddings": is_tied_across_stages,
    }
    for setting, is_set in refused.items():
        if is_set:
            yield (
                f"{setting} does not work with --tst-reset-at-switch embeddings: not all copies "
                "of the weights would be redrawn alike. Remove it, or reset nothing."
            )


def _written(value: Any) -> str:
    return " ".join(str(part) for part in (value if isinstance(value, list) else [value]))
