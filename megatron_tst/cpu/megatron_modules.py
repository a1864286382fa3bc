"""Replaces the parts of Megatron that exist only for GPUs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


def _replace(module_name: str, path: str, replacement: object) -> None:
    """Sets ``module.path`` to ``replacement``, refusing a Megatron that has no such symbol."""
    _wrap(module_name, path, lambda _: replacement)


def _wrap(module_name: str, path: str, make_replacement: Callable[[Any], object]) -> None:
    """As ``_replace``, with what is made of the present value."""
    *parents, name = path.split(".")
    try:
        owner = functools.reduce(getattr, parents, importlib.import_module(module_name))
        present = getattr(owner, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RuntimeError(
            f"The CPU platform replaces {module_name}.{path}, which this Megatron-Core does not "
            "have: install the version pinned in pyproject.toml."
        ) from error
    setattr(owner, name, make_replacement(present))


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
    # First: Megatron binds these when it is imported.
    _install_optimizer()
    _install_layers()
    _install_experts()
    _install_hybrid_stack()
    _install_fully_sharded()
    from megatron_tst.cpu import cross_entropy, gradients
    from megatron_tst.cpu.async_save import start_writer

    # The name by which models call it.
    loss = "vocab_parallel_cross_entropy"
    _wrap("megatron.core.tensor_parallel", loss, cross_entropy.in_chunks)
    _replace("megatron.core.datasets.utils", "compile_helpers", _compile_dataset_helpers)
    ddp = "megatron.core.distributed.distributed_data_parallel"
    make_hook = "DistributedDataParallel._make_backward_post_hook"
    _wrap(ddp, make_hook, gradients.add_in_blocks)
    finalize = "megatron.core.distributed.finalize_model_grads"
    _wrap(finalize, "reset_model_temporary_tensors", gradients.for_experts)
    _replace("megatron.training.initialize", "init_persistent_async_worker", start_writer)


def _install_optimizer() -> None:
    from megatron_tst.cpu import optimizer

    # Megatron takes these from torch where neither Transformer Engine nor apex is installed.
    _replace("torch.optim", "Adam", optimizer.FusedAdam)
    _replace("torch.optim", "AdamW", optimizer.FusedAdamW)
    # Their state is that of apex.
    _replace("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True)
    _replace("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", True)
    _replace("megatron.core.optimizer.clip_grads", "l2_norm_impl", optimizer.l2_norm)
    _replace("megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl", optimizer.scale)
    _replace("megatron.core.optimizer.optimizer", "multi_tensor_scale_impl", optimizer.scale)


def _install_layers() -> None:
    from megatron_tst.cpu import fused_layer, latent_attention, norm, rotary

    _replace("megatron.core.models.backends", "LocalSpecProvider.core_attention", _core_attention)
    _replace("megatron.core.transformer.torch_norm", "WrappedTorchNorm.__new__", norm.build_norm)
    layer = "megatron.core.transformer.transformer_layer"
    _wrap(layer, "TransformerLayer._forward_attention", fused_layer.fuse_attention)
    _wrap(layer, "TransformerLayer._forward_mlp", fused_layer.fuse_mlp)
    _wrap("megatron.training.models.gpt", "_te_or_local_layer_spec", _with_l2_norm)
    checkpoint = "CheckpointWithoutOutput.__init__"
    _wrap("megatron.core.tensor_parallel.random", checkpoint, _without_fp8)
    rotation = "megatron.core.models.common.embeddings.rope_utils"
    _wrap(rotation, "_apply_rotary_pos_emb_bshd", rotary.in_fewer_passes)
    latent = "megatron.core.transformer.multi_latent_attention"
    down_projection = "MLASelfAttention._qkv_down_projection"
    _wrap(latent, down_projection, latent_attention.with_whole_keys)


def _install_experts() -> None:
    from megatron_tst.cpu import experts, swiglu

    mlp = "megatron.core.transformer.mlp"
    shared_experts = "megatron.core.transformer.moe.shared_experts"
    _wrap(mlp, "MLP.forward", experts.pad_rows)
    _replace(mlp, "bias_swiglu_impl", swiglu.bias_swiglu)
    _replace(mlp, "weighted_bias_swiglu_impl", swiglu.weighted_swiglu)
    _replace(shared_experts, "bias_swiglu_impl", swiglu.bias_swiglu)
    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    _replace(dispatcher, "maybe_move_tensor_to_cpu", _on_host)


def _install_fully_sharded() -> None:
    from megatron_tst.cpu import fully_sharded

    wrapper = "megatron.core.distributed.torch_fully_sharded_data_parallel"
    _replace(wrapper, "DeviceMesh", fully_sharded.MeshOfCPUs)
    _wrap(wrapper, "fully_shard", fully_sharded.by_sums)


def _install_hybrid_stack() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_tst.cpu.hybrid_spec import HYBRID_STACK_SPEC

    hybrid = "megatron.training.models.hybrid"
    _replace(hybrid, "default_hybrid_stack_spec", HYBRID_STACK_SPEC)
    _replace("megatron.core.models.hybrid.hybrid_block", "TENorm", WrappedTorchNorm)
