"""Megatron arguments that Megatron-Core 0.19 itself does not heed, or ends over without a word."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_tst.settings.unheeded_model import unheeded_model_settings


def unheeded_arguments(args: argparse.Namespace, has_gpu: bool) -> Iterator[str]:
    """Arguments of a parsed command line that would do nothing, or end in an error of the host.

    Args:
        args: parsed, not validated.
        has_gpu: whether the run is one on GPUs.

    Returns:
        Messages, each naming the argument, its value, the reason and the remedy.
    """
    yield from _anywhere(args)
    yield from unheeded_model_settings(args)
    yield from _activations(args)
    if args.num_experts and args.add_bias_linear:
        yield from _biases_of_experts(args)
    if args.transformer_impl == "local" and has_gpu:
        yield from _local_layers(args)


def _anywhere(args: argparse.Namespace) -> Iterator[str]:
    reasons: dict[str, tuple[object, str]] = {
        "--freeze-all-layers": (
            args.freeze_all_layers,
            "Megatron freezes nothing in a model that is built from a configuration",
        ),
        "--apply-residual-connection-post-layernorm": (
            args.apply_residual_connection_post_layernorm,
            "no layer of Megatron 0.19 looks at it",
        ),
        "--init-method-xavier-uniform": (
            args.init_method_xavier_uniform,
            "Megatron 0.19 makes no configuration of it (--init-method-std is heeded)",
        ),
        f"--config-logger-dir {args.config_logger_dir}": (
            args.config_logger_dir,
            "Megatron 0.19 cannot write process groups",
        ),
        "--attention-backend local": (
            getattr(args.attention_backend, "name", "") == "local",
            "Megatron 0.19 has no specification of that name (--transformer-impl local is heeded)",
        ),
        "--cache-mla-latents": (args.cache_mla_latents, "it is for inference"),
        "--checkpoint-activations": (
            args.checkpoint_activations,
            "Megatron 0.19 ends over it, and with exit code 0 (--recompute-activations is heeded)",
        ),
        f"--decoder-seq-length {args.decoder_seq_length}": (
            args.decoder_seq_length not in (None, args.seq_length),
            "it is for encoders and decoders, and pipeline stages would exchange so many positions",
        ),
        "--inference-rng-tracker": (
            args.inference_rng_tracker,
            "it is for inference, and tensor-parallel ranks would draw the same numbers",
        ),
        "--lazy-mpu-init": (args.lazy_mpu_init, "Megatron's loop never does what it puts off"),
        "--openai-gelu": (args.openai_gelu, "Megatron 0.19 has no such activation"),
        "--vision-pretraining": (args.vision_pretraining, "it is for models of images"),
        "--use-ring-exchange-p2p": (
            args.use_ring_exchange_p2p,
            "torch.distributed has no ring_exchange",
        ),
        "--position-embedding-type mrope": (
            args.position_embedding_type == "mrope",
            "its positions have three parts, and those of text have one",
        ),
        "--qk-l2-norm with --multi-latent-attention": (
            args.qk_l2_norm and args.multi_latent_attention,
            "Megatron has no such layer (--qk-layernorm is heeded)",
        ),
        f"--use-rope-scaling with --hybrid-layer-pattern {args.hybrid_layer_pattern}": (
            args.use_rope_scaling and args.hybrid_layer_pattern,
            "Megatron's HybridModel does not scale positions (GPTModel, by --num-layers, does)",
        ),
        f"--multi-latent-attention with --hybrid-layer-pattern {args.hybrid_layer_pattern}": (
            args.multi_latent_attention and "*" in (args.hybrid_layer_pattern or ""),
            "layers marked * have the usual attention (+ is latent attention)",
        ),
    }
    # Those of multi-token prediction behind the slash do not count.
    layers = len((args.hybrid_layer_pattern or "").partition("/")[0].replace("|", ""))
    reasons[f"--num-layers {args.num_layers} with --hybrid-layer-pattern of {layers} layers"] = (
        layers and args.num_layers not in (None, layers),
        "the pattern says how many there are, attention and MLP each a layer",
    )
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            yield f"{setting} does not work: {reason}. Remove it."


def _activations(args: argparse.Namespace) -> Iterator[str]:
    clamp, offset = args.activation_func_clamp_value, args.glu_linear_offset
    given = []
    if clamp is not None:
        given.append(f"--activation-func-clamp-value {clamp:g}")
    if offset:
        given.append(f"--glu-linear-offset {offset:g}")
    for setting in given:
        if not (args.swiglu or args.quick_geglu):
            yield (
                f"{setting} does nothing without a gated activation: add --swiglu or "
                "--quick-geglu, or remove it."
            )
        elif args.swiglu and args.bias_swiglu_fusion:
            yield (
                f"{setting} is left out by Megatron's fused SwiGLU: add --no-bias-swiglu-fusion, "
                "or remove it."
            )


def _biases_of_experts(args: argparse.Namespace) -> Iterator[str]:
    shared = args.moe_shared_expert_intermediate_size
    if shared is not None:
        yield (
            f"--moe-shared-expert-intermediate-size {shared} does not work with biases: add "
            "--disable-bias-linear."
        )
    elif args.transformer_impl == "local":
        yield (
            f"--num-experts {args.num_experts} with biases does not work with --transformer-impl "
            "local, whose experts add them to a tensor that they must not change: add "
            "--disable-bias-linear."
        )


def _local_layers(args: argparse.Namespace) -> Iterator[str]:
    """What Megatron's own modules lack on a GPU, where the CPU platform does not replace them."""
    if args.normalization == "RMSNorm" and not args.no_persist_layer_norm:
        yield (
            "--normalization RMSNorm with --transformer-impl local needs --no-persist-layer-norm "
            "on a GPU: add it."
        )
    parallel = args.context_parallel_size
    settings = {
        f"--hybrid-layer-pattern {args.hybrid_layer_pattern}": args.hybrid_layer_pattern,
        "--qk-l2-norm": args.qk_l2_norm and not args.num_experts,
        "--multi-latent-attention": args.multi_latent_attention,
        f"--context-parallel-size {parallel}": parallel > 1,
        "--sequence-parallel with --normalization RMSNorm": (
            args.sequence_parallel
            and args.tensor_model_parallel_size > 1
            and args.normalization == "RMSNorm"
        ),
        "--apply-layernorm-1p with --normalization RMSNorm": (
            args.layernorm_zero_centered_gamma and args.normalization == "RMSNorm"
        ),
    }
    for setting, is_set in settings.items():
        if is_set:
            yield (
                f"{setting} does not work with --transformer-impl local on a GPU, whose layers do "
                "not compute it: use transformer_engine."
            )
