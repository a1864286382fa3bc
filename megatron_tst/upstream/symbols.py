"""All of Megatron that this package extends, changes, or knows the inside of.

Data only. ``tests/unit/test_upstream.py`` compares it with the package, which has no patch and no
subclass that is not here, and with the installed Megatron; docs/versions.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VERSIONS = ("0.19.2", "0.20.0")
"""Releases of megatron-core that every entry holds for. 0.20.0 is main of 2026-08-22 (d98e8a6)."""

Use = Literal["subclass", "override", "wrap", "replace", "read"]


@dataclass(frozen=True)
class Symbol:
    """A name of Megatron and how we use it.

    Attributes:
        path: ``module:name``, where it is changed or imported from; the name may be of a class.
        use: a base class; a method that a class of ours overrides; a function that is called by
            what takes its place; one that is not; or what is read of its inside.
        file: of ours, below ``megatron_tst/``.
        why: in a line.
        parameters: that it must take, in this order, others between them.
        attributes: that objects of the class must have.
    """

    path: str
    use: Use
    file: str
    why: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Where it is."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """Within its module."""
        return self.path.partition(":")[2]

    @property
    def user(self) -> str:
        """The file of ours, from the root of the repository."""
        return f"megatron_tst/{self.file}"


def _of(file: str, *rows: tuple[Use, str, str] | tuple[Use, str, str, str]) -> list[Symbol]:
    """Entries of a file of ours: use, path, why, and what it takes and, after a dot, has."""
    entries = []
    for use, path, why, *needs in rows:
        names = " ".join(needs).split()
        parameters = tuple(name for name in names if not name.startswith("."))
        attributes = tuple(name[1:] for name in names if name.startswith("."))
        entries.append(Symbol(path, use, file, why, parameters, attributes))
    return entries


# fmt: off
SYMBOLS: tuple[Symbol, ...] = (
    *_of(
        "model/model.py",
        ("subclass", "megatron.core.models.common.language_module.language_module:LanguageModule",
         "embeds bags, and takes the loss over bags"),
        ("override", "megatron.core.models.common.language_module.language_module:"
         "LanguageModule.compute_language_model_loss",
         "the loss over bags", "self labels logits"),
        ("subclass", "megatron.core.models.gpt.gpt_model:GPTModel",
         "gets the embedding and the loss of bags",
         "pre_process post_process .output_layer .embedding .mtp_process "
         ".share_embeddings_and_output_weights"),
        ("override", "megatron.core.models.gpt.gpt_model:GPTModel.forward",
         "leaves the product of the output layer to the linear loss", "self labels"),
        ("subclass", "megatron.core.models.hybrid.hybrid_model:HybridModel",
         "as GPTModel",
         "pre_process post_process .output_layer .embedding .mtp_process "
         ".share_embeddings_and_output_weights"),
        ("override", "megatron.core.models.hybrid.hybrid_model:HybridModel.forward",
         "as GPTModel", "self labels"),
    ),
    *_of(
        "model/layers.py",
        ("override", "megatron.core.tensor_parallel.layers:VocabParallelEmbedding.forward",
         "averages over bags", "self input_"),
        ("override", "megatron.core.tensor_parallel.layers:ColumnParallelLinear.forward",
         "leaves the product of the output layer to the linear loss",
         "self input_ weight runtime_gather_output"),
    ),
    *_of(
        "model/multi_token.py",
        ("override", "megatron.core.transformer.multi_token_prediction:"
         "MultiTokenPredictionLayer._get_embeddings",
         "a depth reads bags", "self input_ids position_ids embedding"),
        ("replace", "megatron.core.models.gpt.gpt_model:process_mtp_loss",
         "a depth predicts bags", "labels compute_language_model_loss cp_group"),
        ("replace", "megatron.core.models.hybrid.hybrid_model:process_mtp_loss",
         "a depth predicts bags", "labels compute_language_model_loss cp_group"),
    ),
    *_of(
        "data/dataset.py",
        ("subclass", "megatron.core.datasets.gpt_dataset:GPTDataset",
         "samples of bags, then plain ones",
         "indexed_dataset dataset_path indexed_indices num_samples index_split config "
         ".masks_and_position_ids_are_cached .cached_loss_mask .cached_position_ids "
         ".cached_attention_mask ._pad_token_id .unique_identifiers .unique_description_hash"),
        ("override", "megatron.core.datasets.gpt_dataset:GPTDataset.build_low_level_dataset",
         "refuses a damaged corpus", "dataset_path config"),
        ("override", "megatron.core.datasets.gpt_dataset:"
         "GPTDataset._query_document_sample_shuffle_indices",
         "plain samples go on with the text behind the bags", "self idx"),
        ("override", "megatron.core.datasets.gpt_dataset:"
         "GPTDataset._build_document_sample_shuffle_indices",
         "the order of the text is our own", "self"),
        ("override", "megatron.core.datasets.gpt_dataset:GPTDataset._get_num_tokens_per_epoch",
         "refuses a split without text", "self"),
        ("read", "megatron.core.datasets.gpt_dataset:_get_ltor_masks_and_position_ids",
         "the attention mask of a sample of bags",
         "data eod_token reset_position_ids reset_attention_mask eod_mask_loss "
         "create_attention_mask"),
    ),
    *_of(
        "data/files.py",
        ("read", "megatron.core.datasets.indexed_dataset:_INDEX_HEADER", "tells an index file"),
    ),
    *_of(
        "data/dataset_config.py",
        ("subclass", "megatron.core.datasets.gpt_dataset:GPTDatasetConfig",
         "carries the settings of superposition", ".blend .blend_per_split .split_matrix"),
    ),
    *_of(
        "training/step_hook.py",
        ("wrap", "megatron.training.training:checkpoint_and_decide_exit",
         "calls us after each step: the switch, the log",
         "model optimizer opt_param_scheduler iteration"),
        ("wrap", "megatron.training.training:save_checkpoint_and_time",
         "saves a step once where the batch size changes", "iteration"),
        ("wrap", "megatron.training.training:train", "notes what is trained, for skipped steps",
         "forward_step_func model optimizer"),
        ("replace", "megatron.training.training:dummy_train_step",
         "reads the data of a skipped step on every stage, and calls us", "data_iterator"),
    ),
    *_of(
        "training/finished.py",
        ("wrap", "megatron.training.training:evaluate_and_print_results",
         "the loss of a finished run is logged once", "write_to_tensorboard"),
    ),
    *_of(
        "training/schedule_state.py",
        ("wrap", "megatron.training.training:load_checkpoint",
         "keeps the learning rate schedule with --no-load-optim and new rates",
         "optimizer opt_param_scheduler"),
    ),
    *_of(
        "training/random_state.py",
        ("wrap", "megatron.training.checkpointing:generate_state_dict",
         "saves the random state of each rank", "args iteration"),
    ),
    *_of(
        "training/optimizer_state.py",
        ("wrap", "megatron.core.optimizer.distrib_optimizer:"
         "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
         "loads float32 weights without gradients", "self state_dict"),
    ),
    *_of(
        "training/optimizer_sharding.py",
        ("wrap", "megatron.core.optimizer.distrib_optimizer:"
         "DistributedOptimizer.sharded_param_state_fully_reshardable",
         "saves parameters behind padding; known by its source"),
        ("wrap", "megatron.core.optimizer.distrib_optimizer:"
         "DistributedOptimizer.get_parameter_state_dp_reshardable",
         "saves padding between parameters; known by its source", "self"),
        ("read", "megatron.core.optimizer.distrib_optimizer:"
         "DistributedOptimizer.get_parameter_state_dp_zero",
         "what the first of these calls; known by its source"),
        ("read", "megatron.core.optimizer.distrib_optimizer:"
         "DistributedOptimizer.sharded_param_state_dp_reshardable",
         "what calls the second; known by its source"),
        ("read", "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
         "the buffers to save", ".buffers .data_parallel_group"),
        ("read", "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer",
         "where parameters lie in a buffer", ".buckets .numel_unpadded .param_index_map"),
        ("read", "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucket",
         "where a bucket is padded", ".grad_data .numel_unpadded"),
    ),
    *_of(
        "training/fully_sharded.py",
        ("replace", "megatron.core.dist_checkpointing.optimizer:to_local_if_dtensor",
         "torch makes the local part anew at each call", "tensor"),
        ("replace", "megatron.core.distributed.torch_fully_sharded_data_parallel:"
         "TorchFullyShardedDataParallel.scale_gradients",
         "upstream's does nothing", "self scaling_factor"),
        ("read", "megatron.core.distributed.torch_fully_sharded_data_parallel:"
         "TorchFullyShardedDataParallel",
         "the ranks that a gradient is the mean of", ".process_group"),
        ("wrap", "megatron.core.transformer.moe.experts:SequentialMLP.sharded_state_dict",
         "shards of an expert are no copies", "self"),
    ),
    *_of(
        "training/gpt_to_hybrid.py",
        ("wrap", "megatron.core.dist_checkpointing.gpt_checkpoint_interop:"
         "retarget_sharded_state_dict_to_gpt_checkpoint",
         "finds the norms before experts", "sharded_state_dict layer_maps"),
    ),
    *_of(
        "preflight/rank_simulation.py",
        ("replace", "megatron.core.utils:_te_version",
         "a version of Transformer Engine where there is none"),
    ),
    *_of(
        "preflight/stand_ins.py",
        ("subclass", "megatron.core.transformer.module:MegatronModule",
         "attention that only has parameters", "config"),
        ("replace", "megatron.core.models.backends:LocalSpecProvider.core_attention",
         "attention that only has parameters", "self"),
        ("replace", "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
         "norms that only have parameters", "cls config hidden_size eps"),
    ),
    *_of(
        "cpu/megatron_modules.py",
        ("replace", "megatron.core.optimizer:Adam", "our Adam in place of apex's"),
        ("replace", "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
         "our Adam takes apex's arguments"),
        ("replace", "megatron.core.optimizer.distrib_optimizer:Adam",
         "our Adam in place of apex's"),
        ("replace", "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
         "our Adam has the state of apex's"),
        ("replace", "megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER",
         "our Adam has the state of apex's"),
        ("replace", "megatron.core.tensor_parallel.inference_layers:InferenceColumnParallelLinear",
         "no class without Transformer Engine, and main asks for it"),
        ("replace", "megatron.core.tensor_parallel.inference_layers:"
         "InferenceLayerNormColumnParallelLinear",
         "no class without Transformer Engine, and main asks for it"),
        ("replace", "megatron.core.optimizer.clip_grads:l2_norm_impl",
         "the norm of gradients in one pass", "chunk_size noop_flag tensor_lists per_tensor"),
        ("replace", "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
         "scales gradients in place", "chunk_size noop_flag tensor_lists scale"),
        ("replace", "megatron.core.optimizer.optimizer:multi_tensor_scale_impl",
         "scales gradients in place", "chunk_size noop_flag tensor_lists scale"),
        ("replace", "megatron.core.models.backends:LocalSpecProvider.core_attention",
         "torch's attention", "self"),
        ("replace", "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
         "norms under sequence parallelism, and compiled ones", "cls config hidden_size eps"),
        ("wrap", "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention",
         "half a layer in one function", "self hidden_states rotary_pos_emb"),
        ("wrap", "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp",
         "half a layer in one function", "self hidden_states inference_context"),
        ("wrap", "megatron.training.models.gpt:_te_or_local_layer_spec",
         "--qk-l2-norm in local layers", "config"),
        ("wrap", "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
         "no FP8 is no FP8", "self fp8"),
        ("wrap", "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
         "rotates in fewer passes", "t freqs rotary_interleaved mla_rotary_interleaved mscale"),
        ("wrap", "megatron.core.transformer.multi_latent_attention:"
         "MLASelfAttention._qkv_down_projection",
         "adds up the gradients of the keys that all ranks share", "self hidden_states"),
        ("wrap", "megatron.core.transformer.mlp:MLP.forward",
         "pads the rows of experts", "self hidden_states per_token_scale"),
        ("replace", "megatron.core.transformer.mlp:bias_swiglu_impl",
         "SwiGLU in one pass", "input bias fp8_input_store cpu_offload_input"),
        ("replace", "megatron.core.transformer.mlp:weighted_bias_swiglu_impl",
         "SwiGLU in one pass", "input bias weights fp8_input_store"),
        ("replace", "megatron.core.transformer.moe.shared_experts:bias_swiglu_impl",
         "SwiGLU in one pass", "input bias fp8_input_store cpu_offload_input"),
        ("replace", "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
         "sizes that are on the CPU already", "tensor as_numpy record_stream"),
        ("wrap", "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
         "without a float32 copy of the logits",
         "vocab_parallel_logits target label_smoothing tp_group"),
        ("replace", "megatron.core.datasets.utils:compile_helpers", "the wheel has them compiled"),
        ("wrap", "megatron.core.distributed.distributed_data_parallel:"
         "DistributedDataParallel._make_backward_post_hook",
         "adds gradients without a float32 copy", "self param"),
        ("wrap", "megatron.core.distributed.finalize_model_grads:reset_model_temporary_tensors",
         "looks for routers where there are experts", "config model"),
        ("replace", "megatron.core.distributed.torch_fully_sharded_data_parallel:DeviceMesh",
         "a mesh of CPUs"),
        ("wrap", "megatron.core.distributed.torch_fully_sharded_data_parallel:fully_shard",
         "sums where gloo has no average", "module"),
        ("replace", "megatron.training.models.hybrid:default_hybrid_stack_spec",
         "layers without Transformer Engine"),
        ("replace", "megatron.core.models.hybrid.hybrid_block:TENorm",
         "layers without Transformer Engine", "config hidden_size eps"),
        ("replace", "megatron.training.initialize:init_persistent_async_worker",
         "background saves by a fork of the rank", "rank mp_mode"),
    ),
    *_of(
        "cpu/fused_layer.py",
        ("read", "megatron.core.transformer.attention:SelfAttention",
         "what a fused layer needs to know",
         ".hidden_size_per_attention_head .num_query_groups_per_partition"),
    ),
    *_of(
        "cpu/layer_halves.py",
        ("read", "megatron.core.transformer.attention:SelfAttention",
         "whether a fused layer serves", "._yarn_concentration_factor"),
    ),
    *_of(
        "cpu/hybrid_spec.py",
        ("subclass", "megatron.core.models.hybrid.hybrid_block:HybridStack",
         "layers without Transformer Engine", "config submodules"),
        ("subclass", "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayer",
         "layers without Transformer Engine", "config hybrid_submodules"),
    ),
    *_of(
        "cpu/attention.py",
        ("subclass", "megatron.core.transformer.module:MegatronModule",
         "torch's attention", "config"),
    ),
    *_of(
        "cpu/async_save.py",
        ("replace", "megatron.training.async_utils:_async_calls_queue",
         "one background save at a time"),
        ("subclass", "megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue",
         "one background save at a time", "persistent .maybe_finalize_async_calls"),
        ("override", "megatron.core.dist_checkpointing.strategies.async_utils:"
         "AsyncCallsQueue.schedule_async_request",
         "one background save at a time", "self async_request"),
    ),
)
# fmt: on
