"""Sizes and arguments that do not fit each other, all of them, before Megatron's validation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from megatron_tst.preflight.findings import Finding, error, warning
from megatron_tst.settings.judged_arguments import unjudged

_REMOVED = {
    "--moe-use-legacy-grouped-gemm": "remove it",
    "--fp8-param": "use --fp8-param-gather",
    "--keep-fp8-weight-transpose-cache": "use --keep-fp8-transpose-cache or remove it",
    "--async-ckpt-use-cached-structure": "remove it; --ckpt-assume-constant-structure is there",
}
# Of the GPU, by --fp8-recipe.
_CAPABILITIES = {"mxfp8": (10, 0), "blockwise": (9, 0)}


def unjudged_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Iterator[Finding]:
    """Arguments of a newer Megatron that a launch sets, and of which nobody knows what they do.

    Args:
        parser: of Megatron.
        args: parsed by it, not validated.
    """
    for action in unjudged(parser):
        if getattr(args, action.dest, action.default) != action.default:
            yield warning(
                f"{action.option_strings[0]} is new in this Megatron, and what it does with "
                "superposition was never looked at (docs/arguments.md): remove it, or compare "
                "the run with one without it."
            )


def removed_arguments(argv: list[str]) -> list[Finding]:
    """Arguments of older launch scripts that Megatron 0.19 does not have."""
    words = {word.split("=", 1)[0] for word in argv}
    return [
        error(f"{flag} is no argument of Megatron 0.19: {remedy}.")
        for flag, remedy in _REMOVED.items()
        if flag in words
    ]


def misfits(args: argparse.Namespace) -> list[Finding]:
    """Errors of sizes and combinations that a parsed command line has, all of them.

    The process must have called ``rank_simulation.assume_machine``.

    Args:
        args: parsed, not validated.
    """
    # The others divide by these.
    return list(_sizes(args)) or [
        *_dimensions(args),
        *_cluster(args),
        *_experts(args),
        *_recomputation(args),
        *_precision(args),
        *_lengths(args),
    ]


def _sizes(args: argparse.Namespace) -> Iterator[Finding]:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "num_experts",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            yield error(f"--{name.replace('_', '-')} is {value}: use 1 or more.")


def _divides(divisor: int | None, flag: str, number: int | None, what: str) -> Iterator[Finding]:
    if divisor and number and number % divisor:
        fitting = [n for n in range(1, number + 1) if number % n == 0 and n <= 64]
        yield error(
            f"{flag} {divisor} does not divide {what}: use one of {', '.join(map(str, fitting))}."
        )


def _misfit_of_groups(tensor: int, heads: int | None, groups: int | None) -> Iterator[Finding]:
    """Ranks share the groups out, or a group is shared by ranks."""

    def fits(size: int) -> bool:
        return groups is None or groups % size == 0 or size % groups == 0

    if not fits(tensor):
        fitting = [n for n in range(1, 65) if (heads or 0) % n == 0 and fits(n)]
        yield error(
            f"--tensor-model-parallel-size {tensor} is neither a divisor nor a multiple of "
            f"--num-query-groups {groups}: use one of {', '.join(map(str, fitting))}."
        )


def _dimensions(args: argparse.Namespace) -> Iterator[Finding]:
    tensor = args.tensor_model_parallel_size
    flag = "--tensor-model-parallel-size"
    heads, groups = args.num_attention_heads, args.num_query_groups
    yield from _divides(tensor, flag, heads, f"--num-attention-heads {heads}")
    if args.group_query_attention:
        yield from _misfit_of_groups(tensor, heads, groups)
        if heads and groups and heads % groups:
            yield error(
                f"--num-query-groups {groups} does not divide --num-attention-heads {heads}: each "
                "group has the same number of heads."
            )
    ffn = args.ffn_hidden_size
    yield from _divides(tensor, flag, ffn, f"--ffn-hidden-size {ffn}")
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    is_even = not (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
    )
    if is_even:
        yield from _divides(
            stages, "--pipeline-model-parallel-size", layers, f"--num-layers {layers}"
        )


def _cluster(args: argparse.Namespace) -> Iterator[Finding]:
    sizes = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    if args.world_size % sizes:
        yield error(
            f"--world-size {args.world_size} is not a multiple of {sizes}, the GPUs of one copy of "
            "the model (tensor times pipeline times context parallel): change one of them."
        )
        return
    if not (args.micro_batch_size and args.global_batch_size):
        return
    at_once = args.micro_batch_size * (args.world_size // sizes)
    if args.global_batch_size % at_once:
        yield error(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {at_once}, one "
            f"micro-batch of {args.micro_batch_size} on each of {args.world_size // sizes} "
            "data-parallel ranks: change --micro-batch-size, the GPUs or the batch."
        )


def _experts(args: argparse.Namespace) -> Iterator[Finding]:
    experts, parallel = args.num_experts, args.expert_model_parallel_size
    flag = "--expert-model-parallel-size"
    yield from _divides(parallel, flag, experts, f"--num-experts {experts}")
    if not experts:
        if parallel > 1:
            yield error(f"{flag} {parallel} without --num-experts: remove it.")
        return
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    size = parallel * tensor * args.pipeline_model_parallel_size
    if args.world_size % size:
        yield error(
            f"--world-size {args.world_size} is not a multiple of {size}, the GPUs of one copy of "
            f"the experts ({flag} {parallel} times expert tensor parallel times pipeline)."
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield error(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} with --num-experts "
            f"{experts} needs --sequence-parallel, without which Megatron ends at the first step: "
            "add it."
        )
    if args.moe_router_topk > experts:
        yield error(
            f"--moe-router-topk {args.moe_router_topk} is more than --num-experts {experts}."
        )
    if args.moe_router_enable_expert_bias and args.moe_router_score_function == "softmax":
        yield error(
            "--moe-router-enable-expert-bias does not work with --moe-router-score-function "
            "softmax: remove it, or use sigmoid, which no Hugging Face export can hold."
        )
    dispatcher = args.moe_token_dispatcher_type
    is_alone = parallel * tensor == 1 and args.moe_flex_dispatcher_backend != "hybridep"
    if dispatcher == "flex" and is_alone:
        yield error(
            f"--moe-token-dispatcher-type flex needs {flag} above 1: raise it, or use alltoall."
        )
    padding = args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8
    if padding and dispatcher == "allgather":
        yield error(
            "--moe-router-padding-for-quantization does not work with --moe-token-dispatcher-type "
            "allgather: use alltoall or flex."
        )


def _recomputation(args: argparse.Namespace) -> Iterator[Finding]:
    layers = args.recompute_num_layers
    if args.recompute_granularity != "full" or args.recompute_method != "uniform" or layers is None:
        return
    if layers < 1:
        yield error(
            f"--recompute-num-layers {layers} with --recompute-method uniform, over which "
            "Megatron's first step never ends: use 1 or more."
        )
    has_depths = args.mtp_num_layers or "/" in (args.hybrid_layer_pattern or "")
    if layers > 1 and has_depths:
        yield error(
            f"--recompute-num-layers {layers} does not work with multi-token prediction, which "
            "Megatron recomputes a layer at a time: use 1."
        )


def _precision(args: argparse.Namespace) -> Iterator[Finding]:
    reuse = "--reuse-grad-buf-for-mxfp8-param-ag"
    if args.fp8 and args.transformer_impl == "local":
        yield error(
            f"--fp8-format {args.fp8} does not work with --transformer-impl local: use "
            "transformer_engine."
        )
    capability, needed = torch.cuda.get_device_capability(), _CAPABILITIES.get(args.fp8_recipe)
    if args.fp8 and needed and capability < needed:
        yield error(
            f"--fp8-recipe {args.fp8_recipe} needs compute capability {needed[0]}.{needed[1]}, and "
            f"the GPU has {capability[0]}.{capability[1]} (--compute-capability): use tensorwise "
            "on H100."
        )
    if args.fp8_param_gather and not args.use_distributed_optimizer:
        yield error("--fp8-param-gather needs --use-distributed-optimizer: add it.")
    if args.reuse_grad_buf_for_mxfp8_param_ag:
        if args.overlap_param_gather_with_optimizer_step:
            yield error(
                f"{reuse} does not work with --overlap-param-gather-with-optimizer-step, which "
                "reads the buffer while it is written: remove one of them."
            )
        if args.fp8_recipe != "mxfp8" or not args.fp8_param_gather:
            yield error(
                f"{reuse} needs --fp8-recipe mxfp8 (it is {args.fp8_recipe}) and "
                "--fp8-param-gather: add them or remove it."
            )


def _lengths(args: argparse.Namespace) -> Iterator[Finding]:
    length, positions = args.seq_length, args.max_position_embeddings
    if length and positions and length > positions:
        yield error(
            f"--seq-length {length} is above --max-position-embeddings {positions}: raise the "
            "latter; bags do not count, positions are latent."
        )
    parts = args.context_parallel_size
    if length and parts > 1 and length % (2 * parts):
        yield error(
            f"--seq-length {length} is not a multiple of {2 * parts}, twice "
            f"--context-parallel-size {parts}."
        )
    tensor = args.tensor_model_parallel_size
    if length and args.sequence_parallel and length % (tensor * parts):
        yield error(
            f"--seq-length {length} is not a multiple of {tensor * parts}, tensor times context "
            "parallel, with --sequence-parallel."
        )
    steps, warmup = args.train_iters, args.lr_warmup_iters or 0
    decay = (args.lr_wsd_decay_iters or 0) if args.lr_decay_style == "WSD" else 0
    # A warm-up that is too long by itself is refused in every run.
    if steps and decay and warmup < steps < warmup + decay:
        yield error(
            f"--lr-warmup-iters {warmup} and --lr-wsd-decay-iters {decay} are longer than "
            f"--train-iters {steps}: shorten them."
        )
