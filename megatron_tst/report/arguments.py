"""Which arguments of a run can matter for its loss: all but reviewed lists of those that cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_tst.report.describing import DESCRIBED_ARGUMENTS, OFF, Setting, as_one_model

_LAYOUT = """
    tensor_model_parallel_size pipeline_model_parallel_size transformer_pipeline_model_parallel_size
    pipeline_model_parallel_layout virtual_pipeline_model_parallel_size context_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
    microbatch_group_size_per_vp_stage decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split pipeline_model_parallel_comm_backend
    expert_model_parallel_size expert_tensor_parallel_size data_parallel_size sequence_parallel
    hierarchical_context_parallel_sizes cp_comm_type use_tp_pp_dp_mapping world_size rank local_rank
    tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
    gtp_weight_remat_size expert_gtp_weight_remat_size use_layer_wise_distributed_optimizer
    micro_batch_size eval_micro_batch_size use_distributed_optimizer use_torch_fsdp2
    use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy
    num_distributed_optimizer_instances
    distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init
    use_gloo_process_groups create_all_gather_group lazy_mpu_init moe_token_dispatcher_type
    moe_flex_dispatcher_backend moe_enable_deepep nccl_ub nccl_communicator_config_path
    high_priority_stream_groups sharp_enabled_group use_sharp
"""
_KERNELS_AND_MEMORY = """
    transformer_impl attention_backend use_flash_attn flash_attention_version
    masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion
    fused_residual_rmsnorm no_persist_layer_norm gradient_accumulation_fusion
    gradient_reduce_div_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl moe_grouped_gemm
    moe_permute_fusion moe_router_fusion moe_shared_expert_overlap moe_layer_recompute
    mla_down_proj_fusion use_transformer_engine_op_fuser use_te_activation_func disable_jit_fuser
    cuda_graph_impl cuda_graph_modules cuda_graph_warmup_steps enable_cuda_graph
    external_cuda_graph te_rng_tracker optimizer_cuda_graph deterministic_mode
    batch_invariant_mode recompute_granularity recompute_method recompute_modules
    recompute_num_layers distribute_saved_activations delay_wgrad_compute wgrad_deferral_limit
    defer_embedding_wgrad_compute align_grad_reduce align_param_gather optimizer_cpu_offload
    optimizer_offload_fraction use_torch_optimizer_for_cpu_offload pin_cpu_grads pin_cpu_params
    fp8_param_gather fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag
    keep_fp8_transpose_cache manual_gc manual_gc_interval manual_gc_eval
    empty_unused_memory_level use_cpu_initialization init_model_with_meta_device
    use_ring_exchange_p2p clone_scatter_output_in_embedding fine_grained_activation_offloading
    offload_modules train_sync_interval
"""
_FILES = """
    save load save_interval save_retain_interval no_save_optim no_save_rng no_load_rng
    async_save async_strategy use_persistent_ckpt_worker auto_detect_ckpt_format
    non_persistent_save_interval exit_on_missing_checkpoint use_checkpoint_args
    use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args use_dist_ckpt
    use_dist_ckpt_deprecated override_ckpt_iteration
    data_path train_data_path valid_data_path test_data_path data_args_path
    per_split_data_args_path per_dataset_sequences_path
    data_cache_path tokenizer_model vocab_file merge_file num_workers
    num_dataset_builder_threads mmap_bin_files create_attention_mask_in_dataloader
    dataloader_fast_cache_load dataloader_defer_npy_index_mmap object_storage_cache_path
    mid_level_dataset_surplus yaml_cfg
    config_logger_dir disable_msc_deprecated enable_msc verify_integrity
"""
_LOGGING = """
    logging_level exit_interval exit_duration_in_mins exit_signal exit_signal_handler
    exit_signal_handler_for_dataloader exit_signal_handler_for_training adlr_autoresume
    adlr_autoresume_interval eval_interval start_eval_at_iter barrier_with_L1_time
    check_for_nan_in_loss_and_grad check_for_spiky_loss check_for_large_grads rerun_mode
    error_injection_rate error_injection_type disable_straggler_on_startup nvtx_ranges
    record_memory_history record_shapes memory_snapshot_path gpu_sniff_test_interval
    check_weight_hash_across_dp_replicas_interval calc_ft_timeouts enable_ft_package
    result_rejected_tracker_filename run_workload_inspector_server moe_per_layer_logging
"""
_COUNTS = """
    iteration curr_iteration consumed_train_samples consumed_valid_samples skipped_train_samples
    num_floating_point_operations_so_far do_train do_valid do_test ckpt_step start_time
"""
# Told by the steps of a run and by its decay share.
_LENGTH = "train_samples lr_decay_iters lr_decay_samples"
_CANNOT_MATTER = frozenset(
    " ".join([_LAYOUT, _KERNELS_AND_MEMORY, _FILES, _LOGGING, _COUNTS, _LENGTH]).split()
)
_PREFIXES = (
    *("tst_", "ckpt_", "dist_ckpt_", "distrib_optim_", "async_ckpt_", "non_persistent_"),
    *("log_", "tensorboard_", "wandb_", "one_logger_", "enable_one_logger", "app_tag_", "timing_"),
    *("profile", "pytorch_profiler_", "use_pytorch_profiler", "flight_recorder_", "straggler_"),
    *("inprocess_", "fault_injector_", "ft_", "inference_", "rl_", "grpo_", "save_", "ddp_"),
    *("overlap_", "tp_comm_", "fsdp_", "megatron_fsdp_", "moe_deepep_", "moe_hybridep_"),
    *("moe_ncclep_", "moe_flex_dispatcher_", "moe_paged_stash", "moe_routing_trace_", "cpu_off"),
)
"""Of arguments about superposition, which has its own settings, and of what the lists are about."""


def arguments_that_can_matter(arguments: Mapping[str, Any]) -> dict[str, Setting]:
    """Arguments of a run that can have an influence on its loss and that no setting tells.

    Args:
        arguments: Megatron's, by name; those that are None are left out.
    """
    found = {
        name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for name, value in sorted(as_one_model(arguments).items())
        if value is not None
        and name not in _CANNOT_MATTER
        and name not in DESCRIBED_ARGUMENTS
        and not name.startswith(_PREFIXES)
    }
    if arguments.get("weight_decay_incr_style", "constant") == "constant":
        # Megatron sets both to the weight decay, which is a setting.
        found.pop("start_weight_decay", None)
        found.pop("end_weight_decay", None)
    if arguments.get("finetune"):
        # Starts from weights alone, whatever the flag.
        found.pop("no_load_optim", None)
    return found


def argument_of(arguments: Mapping[str, Setting], name: str) -> Setting:
    """A recorded argument; one that is off is as one that a release does not have.

    Args:
        arguments: all that a run recorded, as :func:`arguments_that_can_matter` gives them.
        name: of the argument.
    """
    return arguments.get(name) or OFF
