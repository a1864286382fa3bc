"""Rotary position embeddings and their scaling, as both sides write them."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

# What ``RotaryEmbedding`` of Megatron computes with under --use-rope-scaling, and no argument sets.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTOR = 8.0
_BETA_FAST, _BETA_SLOW, _YARN_LENGTH = 32.0, 1.0, 4096
"""What Megatron takes where a yarn argument is not given."""
YARN_ARGUMENTS = (
    *("rotary_scaling_factor", "mscale", "mscale_all_dim", "yarn_original_max_position_embeddings"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int"),
)
"""What yarn is made of. Releases before core 0.19 have no such arguments and other numbers."""


def unsupported_rope(rope: Mapping[str, Any]) -> Iterator[str]:
    """What Megatron cannot express of a model's ``rope_parameters``, for a message."""
    kind = rope["rope_type"]
    if rope["rope_theta"] != int(rope["rope_theta"]):
        yield f"rope_theta {rope['rope_theta']} (not a whole number)"
    if kind == "linear" and rope["factor"] != int(rope["factor"]):
        yield f"rope_parameters of rope_type linear with factor {rope['factor']} (no whole number)"
    elif kind == "llama3":
        for name, value in _LLAMA3.items():
            if rope.get(name) != value:
                yield f"rope_parameters of rope_type llama3 with {name} {rope.get(name)} ({value})"
    elif kind == "yarn":
        # YarnRotaryEmbedding computes with the whole head.
        if (share := rope.get("partial_rotary_factor", 1.0)) != 1:
            yield f"rope_parameters of rope_type yarn with partial_rotary_factor {share}"
        factor = _attention_factor(rope)
        if not math.isclose(factor, _concentration(**_mscales(rope)), rel_tol=1e-6):
            # Megatron makes it of the factor, and of one up to 1 it makes 1.
            yield (
                f"rope_parameters of rope_type yarn, attention_factor {factor}, with factor "
                f"{rope['factor']}"
            )
    elif kind not in ("default", "linear"):
        yield f"rope_parameters of rope_type {kind} (rope_scaling)"


def rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for ``rope_parameters`` that :func:`unsupported_rope` accepts."""
    values: dict[str, Any] = {
        "position-embedding-type": "rope",
        "rotary-base": int(rope["rope_theta"]),
    }
    match rope["rope_type"]:
        case "linear":
            values["rotary-seq-len-interpolation-factor"] = int(rope["factor"])
        case "llama3":
            values |= {"use-rope-scaling": True, "rope-scaling-factor": float(rope["factor"])}
        case "yarn":
            mscales = _mscales(rope)
            prefix = "" if rope.get("truncate", True) else "no-"
            values |= {
                "position-embedding-type": "yarn",
                "rotary-scaling-factor": float(rope["factor"]),
                "yarn-original-max-position-embeddings": rope["original_max_position_embeddings"],
                "yarn-beta-fast": float(rope.get("beta_fast") or _BETA_FAST),
                "yarn-beta-slow": float(rope.get("beta_slow") or _BETA_SLOW),
                f"{prefix}yarn-correction-range-round-to-int": True,
                "mscale": mscales["mscale"],
                "mscale-all-dim": mscales["mscale_all_dim"],
            }
    return values


def unsupported_rope_arguments(args: Namespace, is_hybrid: bool) -> Iterator[str]:
    """What transformers cannot express of the rotary embedding of a checkpoint."""
    found = {
        "--use-rope-scaling": getattr(args, "use_rope_scaling", False),
        "--rotary-seq-len-interpolation-factor": getattr(
            args, "rotary_seq_len_interpolation_factor", None
        ),
        "--position-embedding-type yarn": is_yarn(args),
    }
    kinds = [flag for flag, is_set in found.items() if is_set]
    if is_yarn(args) and getattr(args, "rotary_percent", 1.0) != 1:
        kinds.append(f"--rotary-percent {args.rotary_percent}")
    if len(kinds) > 1:
        yield " with ".join(kinds)
    if is_hybrid and "--use-rope-scaling" in kinds:
        yield "--use-rope-scaling with --hybrid-layer-pattern (HybridModel does not scale)"


def rope_parameters(args: Namespace) -> dict[str, Any]:
    """The ``rope_parameters`` of a model that was trained with these arguments."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        return rope | {"rope_type": "linear", "factor": float(factor)}
    if getattr(args, "use_rope_scaling", False):
        # Without a flag for it, until core 0.10, it was always 8.
        of_llama = float(getattr(args, "rope_scaling_factor", _LLAMA3_FACTOR))
        return rope | {"rope_type": "llama3", "factor": of_llama, **_LLAMA3}
    if not is_yarn(args):
        return rope
    scale, mscale, all_dim = args.rotary_scaling_factor, args.mscale, args.mscale_all_dim
    length = args.yarn_original_max_position_embeddings or _YARN_LENGTH
    return rope | {
        "rope_type": "yarn",
        "factor": float(scale),
        "original_max_position_embeddings": length,
        "beta_fast": args.yarn_beta_fast or _BETA_FAST,
        "beta_slow": args.yarn_beta_slow or _BETA_SLOW,
        "truncate": args.yarn_correction_range_round_to_int is not False,
        "attention_factor": _concentration(scale, mscale, all_dim),
    }


def is_yarn(args: Namespace) -> bool:
    """Whether positions are scaled by yarn."""
    return getattr(args, "position_embedding_type", "rope") == "yarn"


def _mscales(rope: Mapping[str, Any]) -> dict[str, float]:
    """Scale, and the two numbers that Megatron makes the factor of sines and cosines of."""
    stated, factor = _stated_mscales(rope), _attention_factor(rope)
    if math.isclose(factor, _concentration(**stated), rel_tol=1e-6):
        return stated
    scale = stated["scale"]
    # Other numbers than those it was made of may be right: one fixes the factor.
    mscale = (factor - 1) / (0.1 * math.log(scale)) if scale > 1 else 1.0
    return {"scale": scale, "mscale": mscale, "mscale_all_dim": 0.0}


def _stated_mscales(rope: Mapping[str, Any]) -> dict[str, float]:
    """What transformers makes the factor of where it is not given."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0
    return {
        "scale": float(rope["factor"]),
        "mscale": float(mscale),
        "mscale_all_dim": float(all_dim),
    }


def _attention_factor(rope: Mapping[str, Any]) -> float:
    given = rope.get("attention_factor")
    return _concentration(**_stated_mscales(rope)) if given is None else float(given)


def _concentration(scale: float, mscale: float, mscale_all_dim: float) -> float:
    if scale <= 1:
        return 1.0
    return (0.1 * mscale * math.log(scale) + 1) / (0.1 * mscale_all_dim * math.log(scale) + 1)
