"""The models and parallel layouts that are compared with one process, and the ones that are not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_dtype": "fp32",
    # Of a micro-batch, so that it does not depend on how many there are on a rank.
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
    "qk_layernorm": True,
}
LATENT_ATTENTION: dict[str, Any] = {
    "multi_latent_attention": True,
    "group_query_attention": None,
    "num_query_groups": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"num_layers": 2},
    "Qwen3-MoE": {"num_layers": 2, **_EXPERTS},
    "Llama, hybrid": {"num_layers": None, "hybrid_layer_pattern": "*-*-"},
    "Llama, tied embeddings": {"num_layers": 2, "untie_embeddings_and_output_weights": None},
    "Qwen3-MoE, hybrid": {"num_layers": None, "hybrid_layer_pattern": "*E*E", **_EXPERTS},
    "Llama, MTP 2": {"num_layers": 2, "mtp_num_layers": 2},
    "Qwen3-MoE, MTP": {"num_layers": 2, "mtp_num_layers": 1, **_EXPERTS},
    "Llama, hybrid, MTP": {"num_layers": None, "hybrid_layer_pattern": "*-*-/*-"},
    "Latent attention, hybrid": {
        "num_layers": None,
        "hybrid_layer_pattern": "+-+-",
        **LATENT_ATTENTION,
    },
    "Latent attention, MoE": {
        "num_layers": 2,
        **_EXPERTS,
        **LATENT_ATTENTION,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 32,
    },
    "Windows and sinks, MoE": {
        "num_layers": 2,
        **{name: value for name, value in _EXPERTS.items() if name != "qk_layernorm"},
        "window_size": "8,0",
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 8,
        "swiglu": None,
        "quick_geglu": True,
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
    },
    "muP, learned positions": {
        "num_layers": 2,
        "use_mup": True,
        "mup_base_hidden_size": 16,
        "mup_embedding_mult": 3.0,
        "embedding_init_method_std": 0.05,
        "position_embedding_type": "learned_absolute",
        "attention_output_gate": True,
    },
    "YaRN, hybrid": {
        "num_layers": None,
        "hybrid_layer_pattern": "*-*-",
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 8,
    },
}
"""Of two layers, which is as many as two stages need."""
_GPT = ("Llama", "Qwen3-MoE")
_MOE = ("Qwen3-MoE", "Qwen3-MoE, hybrid")


@dataclass(frozen=True)
class Layout:
    """A way to spread a model over processes.

    Attributes:
        processes: how many.
        arguments: Megatron arguments.
        models: the models that are tested with it.
        dtypes: of the model.
    """

    processes: int
    arguments: dict[str, Any]
    models: tuple[str, ...] = _GPT
    dtypes: tuple[str, ...] = ("fp32",)

    @property
    def stages(self) -> int:
        """Pieces that the layers are cut into, virtual stages included."""
        virtual = 2 if "num_layers_per_virtual_pipeline_stage" in self.arguments else 1
        return int(self.arguments.get("pipeline_model_parallel_size", 1)) * virtual

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        kinds = ("tensor_model", "pipeline_model", "context")
        ranks = [self.arguments.get(f"{kind}_parallel_size", 1) for kind in kinds]
        return self.processes // math.prod(ranks)


_TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
_SP: dict[str, Any] = {**_TP, "sequence_parallel": True}
_PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
_CP: dict[str, Any] = {"context_parallel_size": 2}
_EP: dict[str, Any] = {"expert_model_parallel_size": 2}
SHARDED_OPTIMIZER: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
}
_FSDP2: dict[str, Any] = {"use_torch_fsdp2": True}
_OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Megatron has this schedule for 16-bit models only.
_OVERLAPPED_EXPERTS: dict[str, Any] = {"overlap_moe_expert_parallel_comm": True}
_INTERLEAVED: dict[str, Any] = {**_PP, "num_layers_per_virtual_pipeline_stage": 1}

ALL = ("Llama", "Llama, hybrid", "Qwen3-MoE", "Qwen3-MoE, hybrid")
_ALL_AND_TIED = (*ALL, "Llama, tied embeddings")

LAYOUTS: dict[str, Layout] = {
    "one process": Layout(1, {}, ()),
    "DP 2": Layout(2, {}),
    "DP 2, distributed optimizer": Layout(2, {**SHARDED_OPTIMIZER, **_OVERLAP}, ALL),
    "FSDP2 over 2": Layout(2, _FSDP2, ALL),
    "TP 2": Layout(2, _TP, ("Llama",)),
    "TP 2 + SP": Layout(2, _SP, _ALL_AND_TIED),
    "PP 2": Layout(2, _PP, _ALL_AND_TIED),
    "PP 2, interleaved": Layout(2, _INTERLEAVED, _ALL_AND_TIED),
    "CP 2": Layout(2, _CP, ALL),
    "EP 2, allgather": Layout(2, {**_EP, "moe_token_dispatcher_type": "allgather"}, _MOE),
    "EP 2, alltoall": Layout(2, _EP, _MOE),
    "EP 2, overlapped": Layout(2, {**_EP, **_OVERLAPPED_EXPERTS}, ("Qwen3-MoE",), ("bf16",)),
    "TP 2 + SP, EP 2, ETP 1": Layout(
        2, {**_SP, **_EP, "expert_tensor_parallel_size": 1}, ("Qwen3-MoE",)
    ),
    "DP 4, distributed optimizer": Layout(4, {**SHARDED_OPTIMIZER, **_OVERLAP}, ("Llama",)),
    "FSDP2 over 4": Layout(4, _FSDP2, ("Llama",)),
    "TP 2 + SP, FSDP2 over 2": Layout(4, {**_SP, **_FSDP2}),
    "CP 2, FSDP2 over 2": Layout(2, {**_CP, **_FSDP2}, ("Llama",)),
    "TP 2 + SP, DP 2, distributed optimizer": Layout(4, {**_SP, **SHARDED_OPTIMIZER}),
    "TP 2 + SP, PP 2": Layout(4, {**_SP, **_PP}, ALL),
    "TP 2 + SP, CP 2": Layout(4, {**_SP, **_CP}),
    "PP 4": Layout(4, {"pipeline_model_parallel_size": 4}, ("Llama",)),
    "PP 2, CP 2": Layout(4, {**_PP, **_CP}, ("Llama",)),
    "PP 2, interleaved, DP 2, distributed optimizer": Layout(
        4, {**_INTERLEAVED, **SHARDED_OPTIMIZER, **_OVERLAP}
    ),
    "CP 4": Layout(4, {"context_parallel_size": 4}, ("Llama",)),
    "CP 2, DP 2, distributed optimizer": Layout(4, {**_CP, **SHARDED_OPTIMIZER}, ("Llama",)),
    "EP 4": Layout(4, {"expert_model_parallel_size": 4}, ("Qwen3-MoE",)),
    "EP 2, DP 2, distributed optimizer": Layout(4, {**_EP, **SHARDED_OPTIMIZER}, _MOE),
    "EP 4, distributed optimizer": Layout(
        4, {"expert_model_parallel_size": 4, **SHARDED_OPTIMIZER}, ("Qwen3-MoE",)
    ),
    "TP 2 + SP, EP 2, distributed optimizer": Layout(
        4, {**_SP, **_EP, "expert_tensor_parallel_size": 1, **SHARDED_OPTIMIZER}, _MOE
    ),
    "TP 2 + SP, EP 2, ETP 2": Layout(4, {**_SP, **_EP, "expert_tensor_parallel_size": 2}, _MOE),
    "PP 2, EP 2": Layout(4, {**_PP, **_EP}, _MOE),
    "PP 2, interleaved, EP 2, overlapped": Layout(
        4, {**_INTERLEAVED, **_EP, **_OVERLAPPED_EXPERTS}, ("Qwen3-MoE",), ("bf16",)
    ),
    "CP 2, EP 2": Layout(4, {**_CP, **_EP}, ("Qwen3-MoE",)),
}

# By model, the layouts that it might concern.
_CONCERNED: dict[str, tuple[str, ...]] = {
    "Llama, MTP 2": (
        *("DP 2, distributed optimizer", "TP 2", "TP 2 + SP", "PP 2", "PP 2, interleaved"),
        *("TP 2 + SP, PP 2", "FSDP2 over 2", "TP 2 + SP, FSDP2 over 2"),
    ),
    "Qwen3-MoE, MTP": ("TP 2 + SP", "PP 2", "EP 2, alltoall", "EP 2, overlapped"),
    "Llama, hybrid, MTP": ("TP 2 + SP", "PP 2"),
    "Latent attention, hybrid": ("TP 2 + SP", "PP 2", "CP 2"),
    "Latent attention, MoE": ("TP 2 + SP", "EP 2, alltoall"),
    "Windows and sinks, MoE": ("TP 2 + SP", "PP 2"),
    "muP, learned positions": ("TP 2 + SP", "PP 2", "CP 2"),
    "YaRN, hybrid": ("TP 2 + SP", "CP 2"),
}
for _model, _names in _CONCERNED.items():
    for _name in _names:
        LAYOUTS[_name] = replace(LAYOUTS[_name], models=(*LAYOUTS[_name].models, _model))

# What differs from the full variant in fp32 or bf16, for the layouts that it might concern.
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "input-only": {"tst_variant": "input-only"},
    "output-only": {"tst_variant": "output-only"},
    "per-token loss": {"calculate_per_token_loss": True, "eod_mask_loss": True},
}

UNTESTED = (
    "Any GPU: NCCL, Transformer Engine's modules, FP8, CUDA graphs, and what they overlap.",
    "Expert dispatch through DeepEP or HybridEP (`--moe-token-dispatcher-type flex`).",
    "The transports of `--cp-comm-type`, which is one gather on the CPU platform.",
    "Mamba and gated delta net layers of hybrid models.",
    "fp16 with loss scaling.",
    "torch FSDP2 with Transformer Engine's modules, which are wrapped one by one.",
    "`--moe-router-load-balancing-type global_aux_loss` against one process: by its definition it "
    "depends on the number of micro-batches of a rank.",
    "More than 4 processes.",
)


def model_arguments(model: str, layers: int) -> dict[str, Any]:
    """Megatron arguments of a model with an even number of layers."""
    arguments = dict(MODELS[model])
    if "hybrid_layer_pattern" in arguments:
        main, mark, ahead = arguments["hybrid_layer_pattern"].partition("/")
        arguments["hybrid_layer_pattern"] = main * (layers // 2) + mark + ahead
    else:
        arguments["num_layers"] = layers
    return arguments


def arguments_of(model: str, layout: str, layers: int | None = None) -> dict[str, Any]:
    """Megatron arguments of a model in a layout; by default of as few layers as it can have."""
    stages = LAYOUTS[layout].stages
    arguments = model_arguments(model, layers or max(2, stages)) | LAYOUTS[layout].arguments
    pattern = arguments.get("hybrid_layer_pattern")
    if pattern and stages > 1:
        # A hybrid model is cut at the pipes of its pattern, also into virtual stages.
        arguments.pop("num_layers_per_virtual_pipeline_stage", None)
        main, mark, ahead = pattern.partition("/")
        length = len(main) // stages
        segments = [main[i : i + length] for i in range(0, len(main), length)]
        arguments["hybrid_layer_pattern"] = "|".join(segments) + mark + ahead
    return arguments
