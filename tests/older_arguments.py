"""Checkpoints with the training arguments that an older Megatron would have saved."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint

OLD_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "hybrid_layer_pattern": "hybrid_override_pattern",
}
"""What arguments of today were called, until core 0.15 and 0.16."""
NEWER = (
    *("activation_func_clamp_value", "attention_output_gate"),
    *("experimental_attention_variant", "glu_linear_offset"),
    *("linear_attention_freq", "moe_latent_size"),
    *("moe_mlp_glu_interleave_size", "softmax_type"),
    *("use_mup", "window_size"),
    *("moe_shared_expert_glu_interleave_size", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_correction_range_round_to_int"),
    "yarn_original_max_position_embeddings",
)
"""What core 0.14 did not have yet."""


def save_as_core_0_14(folder: Path, **changes: object) -> Namespace:
    """Gives a checkpoint the training arguments that an older release would have saved."""
    common = TorchDistCheckpoint(folder).read_common()
    args = common["args"]
    vars(args).update(changes)
    for new, old in OLD_NAMES.items():
        setattr(args, old, getattr(args, new))
        delattr(args, new)
    for name in NEWER:
        delattr(args, name)
    torch.save(common, folder / "common.pt")
    old_args: Namespace = args
    return old_args
