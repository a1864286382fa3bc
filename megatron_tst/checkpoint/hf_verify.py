"""Compares an exported model with Megatron's own computation.

Megatron's model is filled through Megatron's description of its checkpoints and never through the
weight map of the export, so that a mistake in that map shows.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.checkpoint.hf_mapping import FUSED_NORM, SEPARATE_NORM
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint

LOGIT_TOLERANCE = 1e-3
"""Two exchanged weights differ by more, the order of sums in fp32 by less."""

# Few, because of experts: rarely, two are so close that the models choose different ones.
_PROMPTS, _LONGEST_PROMPT = 2, 32

# How the run computed, as opposed to what: not needed in one process on a CPU, or not possible.
_ONE_PROCESS_IN_FP32: dict[str, Any] = {
    "transformer_impl": "local",
    "spec": None,
    "params_dtype": torch.float32,
    "attention_softmax_in_fp32": True,
    "fp8": None,
    "fp8_param_gather": False,
    "fp4": None,
    "fp4_param_gather": False,
    "first_last_layers_bf16": False,
    "te_precision_config_file": None,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "fused_single_qkv_rope": False,
    "fused_residual_rmsnorm": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "use_transformer_engine_op_fuser": False,
    "use_te_activation_func": False,
    "use_te_rng_tracker": False,
    "use_kitchen": False,
    "init_model_with_meta_device": False,
    "cuda_graph_impl": "none",
    "cuda_graph_modules": [],
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "fine_grained_activation_offloading": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "mtp_num_layers": None,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_enable_deepep": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "use_grouped_gemm_for_shared_expert": False,
    "moe_router_fusion": False,
    "moe_layer_recompute": False,
    "moe_router_padding_for_quantization": False,
    "moe_router_padding_for_fp8": False,
    "moe_pad_experts_for_cuda_graph_inference": False,
    "moe_paged_stash": False,
    "config_logger_dir": "",
}


def largest_logit_difference(checkpoint: Path, exported: Path) -> float:
    """Runs both models on random tokens, on the CPU in fp32.

    Holds both models in memory, 8 bytes a parameter. Uses the default process group, of one process
    and on gloo, for as long as it takes. The process must have hidden its GPUs
    (``CUDA_VISIBLE_DEVICES=``) and called ``megatron_tst.cpu.activate``.

    Args:
        checkpoint: folder of an iteration, or a folder of ``--save``, as it was exported.
        exported: the folder that was written.

    Returns:
        The largest absolute difference of two logits. Where the exported weights are of a narrower
        dtype than the stored ones, Megatron's are rounded to it before.
    """
    # Here, because the import takes seconds.
    from transformers import AutoConfig, AutoModelForCausalLM

    source = TorchDistCheckpoint(find_checkpoint(checkpoint))
    config = AutoConfig.from_pretrained(exported, local_files_only=True)
    length = min(_LONGEST_PROMPT, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (_PROMPTS, length), generator=generator)
    dtype = config.dtype
    expected = _megatron_logits(source, tokens, dtype)[..., : config.vocab_size]
    model = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    return float((logits - expected).abs().max())


def _megatron_logits(source: TorchDistCheckpoint, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [b, l, V] of Megatron's model of local modules, its weights rounded to ``dtype``."""
    with _single_process():
        model = _build(source.read_common()["args"])
        _fill(model, source, dtype)
        length = tokens.shape[1]
        positions = torch.arange(length).expand_as(tokens)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits: Tensor = model.eval()(tokens, positions, mask)
    return logits.float()


@contextmanager
def _single_process() -> Iterator[None]:
    """Megatron's process groups for this process alone."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _build(trained: Namespace) -> Any:
    """The model of the training arguments, for one process on a CPU."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder

    from megatron_tst.model.config import model_config_from_args

    # A checkpoint of an older release lacks arguments, and that release did what is default now.
    args = Namespace(**vars(parse_arguments([])) | vars(trained))
    for field in dataclasses.fields(ModelParallelConfig):
        if hasattr(args, field.name) and field.default is not dataclasses.MISSING:
            setattr(args, field.name, field.default)
    vars(args).update(_ONE_PROCESS_IN_FP32, use_cpu_initialization=True)
    if args.hybrid_layer_pattern:
        # One pipeline stage, and what is exported.
        main_layers = args.hybrid_layer_pattern.partition("/")[0]
        args.hybrid_layer_pattern = main_layers.replace("|", "")
    builder = HybridModelBuilder if args.hybrid_layer_pattern else GPTModelBuilder
    config = model_config_from_args(args)
    config.perform_initialization = False
    config.finalize()
    return builder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def _fill(model: Any, source: TorchDistCheckpoint, dtype: torch.dtype) -> None:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    stored = source.shapes()
    for part in nested_values(state):
        if not isinstance(part, ShardedTensor):
            continue
        key = part.key
        if key not in stored:
            # The local modules of GPTModel name the norm before experts as if it were fused.
            key = key.replace(FUSED_NORM, SEPARATE_NORM)
        weight = source.read_chunk(key, part.global_offset, part.local_shape, part.prepend_axis_num)
        with torch.no_grad():
            # The bias of a router stays in fp32 on both sides.
            part.data.copy_(weight if key.endswith("expert_bias") else weight.to(dtype))
