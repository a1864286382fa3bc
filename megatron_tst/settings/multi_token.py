"""What multi-token prediction does not go together with, in Megatron-Core 0.19.2 and here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_tst.settings.arguments import has_bags


def multi_token_conflicts(args: argparse.Namespace) -> Iterator[str]:
    """Settings that ``--mtp-num-layers`` does not work with, at any bag size.

    Args:
        args: command line, not validated.

    Returns:
        Messages, each naming both settings, the reason and the remedy.
    """
    if not depths(args):
        return
    setting = f"--mtp-num-layers {args.mtp_num_layers}"
    if args.mtp_num_layers is None:
        setting = f"--hybrid-layer-pattern {args.hybrid_layer_pattern}"
    for other, (is_set, reason) in {**_losses(args), **_layouts(args)}.items():
        if is_set:
            yield f"{setting} does not work with {other}: {reason}. Remove one of them."


def depths(args: argparse.Namespace) -> int:
    """How many bags or tokens behind the next one are predicted.

    Args:
        args: command line; Megatron counts the depths of a pattern only when it validates.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None) or ""
    in_pattern = sum(map(bool, pattern.split("/")[1:]))
    return in_pattern or getattr(args, "mtp_num_layers", None) or 0


def _losses(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    return {
        "--tst-loss-impl linear": (
            args.tst_loss_impl == "linear",
            "Megatron counts right predictions by the logits of each depth (--tst-loss-impl auto "
            "works)",
        ),
        # The last one in is the first one out in autograd, and the first one in is in the buffer.
        "--defer-embedding-wgrad-compute": (
            args.defer_embedding_wgrad_compute,
            "Megatron would multiply the inputs of one depth by the gradients of another, as it "
            "keeps both in the order of their passes",
        ),
        # Megatron-LM issue 7452, finding 3.
        "--calculate-per-token-loss and --eod-mask-loss": (
            args.calculate_per_token_loss and args.eod_mask_loss,
            _LOCAL_COUNTS,
        ),
        "--calculate-per-token-loss and --tst-document-boundary align": (
            args.calculate_per_token_loss
            and has_bags(args)
            and args.tst_document_boundary == "align",
            _LOCAL_COUNTS,
        ),
        "--calculate-per-token-loss and --dataloader-inter-document-masking": (
            args.calculate_per_token_loss and args.dataloader_inter_document_masking,
            _LOCAL_COUNTS,
        ),
    }


_LOCAL_COUNTS = (
    "Megatron divides the losses of a depth by the targets that a micro-batch of one rank has, and "
    "these differ"
)


def _layouts(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    stages, layout = args.pipeline_model_parallel_size, args.pipeline_model_parallel_layout
    return {
        # Megatron-LM PR 7498.
        f"--context-parallel-size {args.context_parallel_size}": (
            args.context_parallel_size > 1,
            "Megatron divides the losses of a depth by the targets that one rank has, and the "
            "rank with the end of a sequence has fewer",
        ),
        # Megatron-LM PR 7577.
        f"--pipeline-model-parallel-size {stages} without --untie-embeddings-and-output-weights": (
            stages > 1 and not args.untie_embeddings_and_output_weights,
            "Megatron gives the last stage an output layer that it never reads, and saves no "
            "checkpoint of it (untied embeddings work)",
        ),
        f"--pipeline-model-parallel-layout {layout}": (
            layout is not None and "m" not in str(layout).rpartition("|")[2],
            "tokens and targets reach the first and the last stage only, so that these layers (m) "
            "have to be on the last one",
        ),
        f"--tst-reset-at-switch embeddings and --pipeline-model-parallel-size {stages}": (
            stages > 1 and has_bags(args) and args.tst_reset_at_switch == "embeddings",
            "the last stage has a copy of the embedding, which would be drawn anew by itself",
        ),
    }
