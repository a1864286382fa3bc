"""Replaces the parts of Megatron that exist only for GPUs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_tst.upstream.patches import replace, wrap


def _core_attention(self: object) -> type:
    from megatron_tst.cpu.attention import CoreAttention

    return CoreAttention


def _with_l2_norm(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``_te_or_local_layer_spec``, which leaves ``--qk-l2-norm`` out of local layers."""

    @functools.wraps(build)
    def layer_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.transformer.torch_norm import L2Norm

        spec = build(config, *args, **kwargs)
        if config.transformer.qk_l2_norm and not config.transformer.multi_latent_attention:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = L2Norm
        return spec

    return layer_spec


def _without_fp8(init: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``CheckpointWithoutOutput.__init__``.

    It takes its own default, that there is no FP8, for FP8, and asks Transformer Engine.
    """

    @functools.wraps(init)
    def initialise(self: Any, fp8: Any = None, **others: Any) -> None:
        init(self, None if fp8 is False else fp8, **others)

    return initialise


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # The split sizes of an all-to-all: torch takes a sequence of numbers, and upstream makes one
    # only of tensors that come from a GPU.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _compile_dataset_helpers() -> None:
    # The wheel ships the compiled module and no Makefile, so there is nothing to build.
    importlib.import_module("megatron.core.datasets.helpers_cpp")


def install() -> None:
    """Installs the replacements."""
    _install_optimizer()
    _install_layers()
    _install_experts()
    _install_hybrid_stack()
    _install_fully_sharded()
    from megatron_tst.cpu import cross_entropy, gradients
    from megatron_tst.cpu.async_save import start_writer

    # The name by which models call it.
    wrap("megatron.core.tensor_parallel:vocab_parallel_cross_entropy", cross_entropy.in_chunks)
    replace("megatron.core.datasets.utils:compile_helpers", _compile_dataset_helpers)
    wrap(
        "megatron.core.distributed.distributed_data_parallel:"
        "DistributedDataParallel._make_backward_post_hook",
        gradients.add_in_blocks,
    )
    wrap(
        "megatron.core.distributed.finalize_model_grads:reset_model_temporary_tensors",
        gradients.for_experts,
    )
    replace("megatron.training.initialize:init_persistent_async_worker", start_writer)
    # Main asks whether a layer is one of these, which without Transformer Engine are no classes.
    replace(
        "megatron.core.tensor_parallel.inference_layers:InferenceColumnParallelLinear", _NotHere
    )
    replace(
        "megatron.core.tensor_parallel.inference_layers:InferenceLayerNormColumnParallelLinear",
        _NotHere,
    )


class _NotHere:
    """Layers that only Transformer Engine has."""


def _install_optimizer() -> None:
    from megatron_tst.cpu import optimizer

    # Megatron's own names and not torch's: other code of the process keeps torch's optimizers.
    replace("megatron.core.optimizer:Adam", optimizer.FusedAdam)
    replace("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", False)
    replace("megatron.core.optimizer.distrib_optimizer:Adam", optimizer.FusedAdam)
    # Its state is that of apex.
    replace("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", True)
    replace("megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", True)
    replace("megatron.core.optimizer.clip_grads:l2_norm_impl", optimizer.l2_norm)
    replace("megatron.core.optimizer.clip_grads:multi_tensor_scale_impl", optimizer.scale)
    replace("megatron.core.optimizer.optimizer:multi_tensor_scale_impl", optimizer.scale)


def _install_layers() -> None:
    from megatron_tst.cpu import fused_layer, latent_attention, norm, rotary

    replace("megatron.core.models.backends:LocalSpecProvider.core_attention", _core_attention)
    replace("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", norm.build_norm)
    wrap(
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention",
        fused_layer.fuse_attention,
    )
    wrap(
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp",
        fused_layer.fuse_mlp,
    )
    wrap("megatron.training.models.gpt:_te_or_local_layer_spec", _with_l2_norm)
    wrap("megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__", _without_fp8)
    wrap(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        rotary.in_fewer_passes,
    )
    wrap(
        "megatron.core.transformer.multi_latent_attention:MLASelfAttention._qkv_down_projection",
        latent_attention.with_whole_keys,
    )


def _install_experts() -> None:
    from megatron_tst.cpu import experts, swiglu

    wrap("megatron.core.transformer.mlp:MLP.forward", experts.pad_rows)
    replace("megatron.core.transformer.mlp:bias_swiglu_impl", swiglu.bias_swiglu)
    replace("megatron.core.transformer.mlp:weighted_bias_swiglu_impl", swiglu.weighted_swiglu)
    replace("megatron.core.transformer.moe.shared_experts:bias_swiglu_impl", swiglu.bias_swiglu)
    replace("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", _on_host)


def _install_fully_sharded() -> None:
    from megatron_tst.cpu import fully_sharded

    replace(
        "megatron.core.distributed.torch_fully_sharded_data_parallel:DeviceMesh",
        fully_sharded.MeshOfCPUs,
    )
    wrap(
        "megatron.core.distributed.torch_fully_sharded_data_parallel:fully_shard",
        fully_sharded.by_sums,
    )


def _install_hybrid_stack() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_tst.cpu.hybrid_spec import HYBRID_STACK_SPEC

    replace("megatron.training.models.hybrid:default_hybrid_stack_spec", HYBRID_STACK_SPEC)
    replace("megatron.core.models.hybrid.hybrid_block:TENorm", WrappedTorchNorm)
