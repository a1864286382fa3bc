"""Launches that a GPU computes, and neither Megatron's local modules nor the CPU platform."""

from __future__ import annotations

# Its arguments, and those that it takes the place of.
LATENT = "--multi-latent-attention --q-lora-rank 256 --kv-lora-rank 128"
HEADS = "--group-query-attention --num-query-groups --kv-channels"
# What a GPU computes and local modules or the CPU platform do not: model, arguments taken
# away, arguments added, parameters more than without (None: not built without Transformer Engine).
GPU_ONLY: dict[str, tuple[str, str, str, int | None]] = {
    "window": ("3b", "", "--window-size 1024,0 --window-attn-skip-freq 4", 0),
    "sink": ("3b", "", "--softmax-type learnable", 4 * 16),
    "sink, split": (
        "3b",
        "",
        "--softmax-type learnable --tensor-model-parallel-size 2 --sequence-parallel",
        4 * 16,
    ),
    "off by one": ("3b", "", "--softmax-type off-by-one", 0),
    "scaled by layer": ("3b", "", "--apply-query-key-layer-scaling", 0),
    "norm from zero": ("3b", "", "--apply-layernorm-1p", 0),
    "dropout over context": (
        "3b",
        "--attention-dropout",
        "--attention-dropout 0.1 --context-parallel-size 2",
        0,
    ),
    "fp32 residual": ("3b", "", "--fp32-residual-connection", 0),
    "L2 norm": ("3b", "", "--qk-l2-norm", 0),
    "offloading": ("3b", "", "--cpu-offloading-num-layers 2", 0),
    "graphs": ("3b", "", "--cuda-graph-impl local --te-rng-tracker", 0),
    "flex": (
        "10b_a1b",
        "--moe-token-dispatcher-type",
        "--moe-token-dispatcher-type flex --expert-model-parallel-size 8",
        0,
    ),
    "grouped shared expert": (
        "10b_a1b",
        "",
        "--moe-shared-expert-intermediate-size 512 --use-grouped-gemm-for-shared-expert",
        # Three matrices in each layer.
        4 * 3 * 512 * 1536,
    ),
    "latent experts": ("10b_a1b", "", "--moe-latent-size 256", None),
    "delta net": (
        "3b",
        "",
        "--experimental-attention-variant gated_delta_net --linear-attention-freq 4",
        None,
    ),
}
LATENT_LAYOUTS = {
    "one": "",
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel",
    "context": "--context-parallel-size 2",
}
