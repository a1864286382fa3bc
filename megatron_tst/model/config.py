"""The configuration of Megatron's model, as the command line asks for it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args


def model_config_from_args(args: Namespace) -> Any:
    """What Megatron's builders make a ``GPTModel`` or a ``HybridModel`` of.

    ``gpt_config_from_args`` of 0.19.2 drops ``--rope-scaling-factor``, so that each model is scaled
    by 8 (NVIDIA/Megatron-LM issue 6305, mended on main by 6306). Here it counts.

    Args:
        args: Megatron's, validated.
    """
    if args.hybrid_layer_pattern:
        return hybrid_config_from_args(args)
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config
