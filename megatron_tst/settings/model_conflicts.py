"""Layers of a model that do not go together with a layout, in Megatron-Core 0.19.2 or here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_tst.settings.arguments import bags_flag, has_bags

_DRIFTING = {
    # Megatron-LM issue 7452, finding 11.
    "gated delta rule": "the gradient of the norm behind the gated delta rule",
    # Megatron-LM PR 6839.
    "latent attention": "the gradients of the keys that the heads of all ranks share",
}
"""What Megatron adds up under sequence parallelism only. Without, weights of ranks drift apart."""


def model_conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Layers that a layout does not train right, at any bag size, or not with superposition.

    Args:
        args: command line, not validated.

    Returns:
        Messages, each naming both settings, the reason and the remedy.
    """
    ranks = args.tensor_model_parallel_size
    if ranks > 1 and not args.sequence_parallel:
        for setting, layer in _drifting_layers(args):
            yield (
                f"{setting} does not work with --tensor-model-parallel-size {ranks} without "
                f"--sequence-parallel: Megatron does not add up {_DRIFTING[layer]}. Add "
                "--sequence-parallel."
            )
    if has_bags(args) or args.tst_loss_impl == "linear":
        yield from _with_weight_shards(args)


def _drifting_layers(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Settings that ask for a layer of ``_DRIFTING``, and its name there."""
    pattern = args.hybrid_layer_pattern or ""
    if "G" in pattern:
        yield f"--hybrid-layer-pattern {pattern}", "gated delta rule"
    if args.experimental_attention_variant == "gated_delta_net":
        yield "--experimental-attention-variant gated_delta_net", "gated delta rule"
    if set(pattern) & set("+D"):
        yield f"--hybrid-layer-pattern {pattern}", "latent attention"
    elif args.multi_latent_attention:
        yield "--multi-latent-attention", "latent attention"


def _with_weight_shards(args: argparse.Namespace) -> Iterator[str]:
    shards, ranks = args.tensor_parallel_num_weight_shards, args.tensor_model_parallel_size
    if shards is not None and shards > ranks:
        setting = bags_flag(args) if has_bags(args) else "--tst-loss-impl linear"
        yield (
            f"--tensor-parallel-num-weight-shards {shards} with --tensor-model-parallel-size "
            f"{ranks} does not work with {setting}: the rows of embedding and output layer are "
            "gathered inside of Megatron's layers only. Remove it."
        )
