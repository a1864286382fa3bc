"""Arguments that Megatron accepts silently and that a pre-training run hardly wants."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tst.preflight.findings import Finding, note, warning
from megatron_tst.settings.arguments import bags_flag
from megatron_tst.settings.losses import is_hosts, losses_of_run
from megatron_tst.settings.phases import bags_name, plain_name
from megatron_tst.settings.schedule import SuperpositionSchedule

_PUBLISHED_RATIOS = (0.2, 0.4)
_LARGEST_PUBLISHED_BAG = 16
# That of the 600M; matrix products of the next, 2048, are bound by arithmetic.
_SMALL_HIDDEN_SIZE = 1024


@dataclass(frozen=True)
class _Default:
    """A default of Megatron that the published models do not have.

    Attributes:
        flag: the argument that sets it, or takes it back.
        name: among the parsed arguments.
        value: the default.
        remedy: what to pass.
        needs: an argument without which it does not matter.
    """

    flag: str
    name: str
    value: Any
    remedy: str
    needs: str | None = None


_DEFAULTS = (
    _Default("--attention-dropout", "attention_dropout", 0.1, "0"),
    _Default("--hidden-dropout", "hidden_dropout", 0.1, "0"),
    _Default("--normalization", "normalization", "LayerNorm", "RMSNorm"),
    _Default("--position-embedding-type", "position_embedding_type", "learned_absolute", "rope"),
    _Default("--adam-beta2", "adam_beta2", 0.999, "0.95"),
    _Default("--weight-decay", "weight_decay", 0.01, "0.1"),
    _Default("--lr-decay-style", "lr_decay_style", "linear", "WSD"),
    _Default("--lr-wsd-decay-style", "lr_wsd_decay_style", "exponential", "linear"),
    _Default("--moe-router-topk", "moe_router_topk", 2, "8", "num_experts"),
    _Default("--moe-aux-loss-coeff", "moe_aux_loss_coeff", 0.0, "1e-3", "num_experts"),
    _Default("--moe-router-dtype", "moe_router_dtype", None, "fp32", "num_experts"),
    _Default(
        "--moe-token-dispatcher-type",
        "moe_token_dispatcher_type",
        "allgather",
        "alltoall",
        "num_experts",
    ),
)


@dataclass(frozen=True)
class _Missing:
    """A flag without a value that a launch has left out.

    Attributes:
        flag: the argument.
        name: among the parsed arguments.
        absent: what it is parsed as without the flag.
        effect: of leaving it out.
    """

    flag: str
    name: str
    absent: Any
    effect: str


_MISSING = (
    _Missing("--bf16", "bf16", False, "weights and products are fp32"),
    _Missing("--swiglu", "swiglu", False, "the MLP has a plain GELU"),
    _Missing("--disable-bias-linear", "add_bias_linear", True, "every linear layer has a bias"),
    _Missing(
        "--untie-embeddings-and-output-weights",
        "untie_embeddings_and_output_weights",
        False,
        "embedding and output layer share their weights, and superposition averages the one and "
        "not the other",
    ),
    _Missing(
        "--manual-gc",
        "manual_gc",
        False,
        "ranks collect garbage at different steps, and all wait for each. Add it, with "
        "--manual-gc-interval 100",
    ),
    _Missing(
        "--dist-ckpt-optim-fully-reshardable",
        "dist_ckpt_optim_fully_reshardable",
        False,
        "the optimizer state resumes at other data-parallel sizes, and at no other layout",
    ),
)


def suspects(
    args: argparse.Namespace, given: Collection[str], schedule: SuperpositionSchedule
) -> list[Finding]:
    """Warnings, in the order of a command line.

    Args:
        args: validated.
        given: names of the arguments that the command line has.
        schedule: phases of the run.
    """
    return [
        *_defaults(args, given),
        *_experts(args),
        *_parallelism(args),
        *_checkpoints(args),
        *_learning_rate(args),
        *_superposition(args, schedule),
        *_losses(args),
        *_small_kernels(args),
    ]


def _defaults(args: argparse.Namespace, given: Collection[str]) -> Iterator[Finding]:
    for default in _DEFAULTS:
        matters = default.needs is None or getattr(args, default.needs)
        if default.name == "lr_wsd_decay_style":
            matters = args.lr_decay_style == "WSD"
        is_left = default.name not in given and getattr(args, default.name) == default.value
        if matters and is_left:
            yield warning(
                f"{default.flag} is not given, and Megatron's default is {default.value}: pass "
                f"{default.flag} {default.remedy}, or {default.value} if that is meant."
            )
    for flag in _MISSING:
        if getattr(args, flag.name) == flag.absent:
            yield warning(f"{flag.flag} is not given: {flag.effect}.")


def _experts(args: argparse.Namespace) -> Iterator[Finding]:
    if not args.num_experts:
        return
    if args.moe_router_pre_softmax:
        yield warning(
            "--moe-router-pre-softmax: the probabilities of the chosen experts do not add up to "
            "one, which an export says (norm_topk_prob false). Qwen3's own models renormalise: "
            "remove it, unless the run goes on from a model without that."
        )
    if args.moe_grouped_gemm and args.transformer_impl == "local":
        yield warning(
            "--moe-grouped-gemm is ignored with --transformer-impl local, whose experts run one "
            "after the other: use transformer_engine."
        )
    if not args.moe_grouped_gemm:
        yield warning("--moe-grouped-gemm is not given: experts run one after the other. Add it.")
    ranks = args.data_parallel_size
    if "global_aux_loss" in args.moe_router_load_balancing_type and ranks > 1:
        yield note(
            "--moe-router-load-balancing-type global_aux_loss: Megatron divides its gradient by "
            f"the {ranks} data-parallel ranks once too often, so that --moe-aux-loss-coeff "
            f"{args.moe_aux_loss_coeff} balances experts {ranks} times as weakly as with aux_loss "
            "(docs/host-faults.md)."
        )
    if args.fp8 and not _pads_tokens(args):
        yield warning(
            "--moe-router-padding-for-quantization is not given: with FP8 the tokens of an expert "
            "are then padded in copies. Add it."
        )


def _pads_tokens(args: argparse.Namespace) -> bool:
    return bool(args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8)


def _parallelism(args: argparse.Namespace) -> Iterator[Finding]:
    is_mxfp8 = args.fp8 and args.fp8_recipe == "mxfp8"
    if is_mxfp8 and not (args.fp8_param_gather and args.reuse_grad_buf_for_mxfp8_param_ag):
        yield warning(
            "--fp8-recipe mxfp8 without --fp8-param-gather and --reuse-grad-buf-for-mxfp8-param-ag "
            "holds weights in more than one precision, or gathers them into memory of their own: "
            "add both."
        )
    has_replicas = args.data_parallel_size > 1 and not args.use_torch_fsdp2
    if has_replicas and not args.use_distributed_optimizer:
        yield warning(
            "--use-distributed-optimizer is not given: each GPU holds the optimizer state of all "
            "its weights. Add it."
        )
    if has_replicas and not args.overlap_grad_reduce:
        yield warning("--overlap-grad-reduce is not given: the GPUs wait for each reduction.")
    if args.create_attention_mask_in_dataloader and not args.reset_attention_mask:
        size = args.micro_batch_size * args.seq_length**2
        yield warning(
            "--no-create-attention-mask-in-dataloader is not given: each micro-batch carries a "
            f"mask of {size / 1e6:,.0f} MB that causal attention does not read. Add it."
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield warning(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} without "
            "--sequence-parallel: norms and residuals are kept on each of its GPUs. Add it."
        )


def _checkpoints(args: argparse.Namespace) -> Iterator[Finding]:
    if args.save is None:
        yield warning("--save is not given: nothing of the run will be left. Add it.")
        return
    if args.load != args.save:
        yield warning(
            f"--load {args.load} is not --save {args.save}: a job that starts again does not "
            "resume what it saved. Pass the same folder."
        )
    for flag in ("no_save_optim", "no_save_rng", "no_load_optim", "no_load_rng"):
        if getattr(args, flag):
            yield warning(
                f"--{flag.replace('_', '-')}: a resumed run differs from one that was not stopped. "
                "Remove it."
            )
    if not args.save_interval:
        yield warning("--save-interval is not given: only the switch and the end are saved.")
    if args.override_opt_param_scheduler:
        yield warning(
            "--override-opt-param-scheduler: a resume then takes the learning rate of the command "
            "line and not of the checkpoint, which one horizon over both phases makes needless. "
            "Remove it."
        )


def _learning_rate(args: argparse.Namespace) -> Iterator[Finding]:
    steps = args.train_iters
    horizon = args.lr_decay_iters
    if steps and horizon and horizon != steps:
        yield warning(
            f"--lr-decay-iters {horizon} is not --train-iters {steps}: the learning rate should "
            "have one horizon over both phases. Remove it."
        )


def _superposition(args: argparse.Namespace, schedule: SuperpositionSchedule) -> Iterator[Finding]:
    if not schedule.config.enabled:
        if args.tst_step_ratio or args.tst_steps:
            yield warning(
                "--tst-bag-size is 1, and the length of phase 1 has no effect: pass a bag size of "
                "2 or more, or remove --tst-step-ratio and --tst-steps."
            )
        return
    ratio = schedule.switch_step / schedule.total_steps
    length = "--tst-schedule" if args.tst_schedule else "--tst-step-ratio"
    low, high = _PUBLISHED_RATIOS
    if not low <= ratio <= high:
        yield warning(
            f"{bags_name(schedule.phases)} takes {ratio:.3g} of the steps ({length}): "
            f"published best is {low} to {high}; below there is little gain, above 0.5 no full "
            "recovery."
        )
    if schedule.config.bag_size > _LARGEST_PUBLISHED_BAG:
        yield warning(
            f"{bags_flag(args)} has bags of {schedule.config.bag_size}: the largest published "
            f"ones are of {_LARGEST_PUBLISHED_BAG}."
        )
    decay = args.lr_wsd_decay_iters if args.lr_decay_style == "WSD" else None
    if decay and schedule.switch_step > schedule.total_steps - decay:
        yield warning(
            f"the switch at step {schedule.switch_step} comes after the decay of the learning rate "
            f"has begun at {schedule.total_steps - decay} (--lr-wsd-decay-iters {decay}): "
            f"{plain_name(schedule.phases)} never has the full rate. Lower {length}."
        )
    first_switch = schedule.phases[1].first_step
    if args.lr_warmup_iters and first_switch < args.lr_warmup_iters:
        yield warning(
            f"the switch at step {first_switch} comes before the end of the warm-up "
            f"(--lr-warmup-iters {args.lr_warmup_iters}): raise {length}."
        )


def _losses(args: argparse.Namespace) -> Iterator[Finding]:
    losses = losses_of_run(args, has_gpu=True)
    if is_hosts(losses["plain"]):
        setting = "--tst-loss-impl host"
        if args.cross_entropy_loss_fusion:
            setting = "--cross-entropy-loss-fusion"
        yield warning(
            f"{setting}: Megatron's loss of single targets moves several times as many bytes as "
            "the kernel that bags get, so that step times of runs with bags and without compare "
            "kernels and not methods; reports refuse to. Remove it."
        )


def _small_kernels(args: argparse.Namespace) -> Iterator[Finding]:
    if args.hidden_size > _SMALL_HIDDEN_SIZE:
        return
    if args.cuda_graph_impl == "none":
        yield warning(
            f"--cuda-graph-impl is not given, and kernels of --hidden-size {args.hidden_size} take "
            "less time than their launches: pass --cuda-graph-impl transformer_engine and "
            "--te-rng-tracker, with NCCL_GRAPH_REGISTER=0 where segments are expandable."
        )
    if args.fp8:
        yield warning(
            f"--fp8-format {args.fp8} with --hidden-size {args.hidden_size}: products this narrow "
            "are bound by memory, and quantizing reads it once more. Measure bf16 beside it."
        )


def engine_note(installed: str | None, assumed: str) -> Finding:
    """What was built: with this version of Transformer Engine, or assumed as if it were another."""
    if installed is not None:
        return note(
            f"built with Transformer Engine {installed} on the meta device, its weights in bf16."
        )
    return note(
        f"Transformer Engine is not installed here: version {assumed} was assumed in the checks, "
        "and Megatron's local modules were built, which have the same parameters in bf16."
    )
