"""Bad input ends in one line that names the flag or file, its value and the remedy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.settings.conflicts import _CONFLICTS
from tests.corpus import write_corpus
from tests.runs import TOTAL_STEPS, Check, SmallRun
from tests.zygote import ROOT, Launcher

SUPERPOSED: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": 5}


def assert_messages(found: list[str | None], expected: Sequence[str | None]) -> None:
    """Requires one line that matches each regular expression, and no message for None."""
    wrong = [
        (message, pattern)
        for message, pattern in zip(found, expected, strict=True)
        if (message is None) != (pattern is None)
        or (message is not None and ("\n" in message or not re.search(pattern or "", message)))
    ]
    assert not wrong, "\n".join(f"{message}\n    is not {pattern}" for message, pattern in wrong)


# Refused before Megatron validates the command line; a part of the message is a regular expression.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"tst_bag_size": 0}, "--tst-bag-size is 0: use 1 to turn superposition off"),
    ({"tst_bag_size": -1}, "--tst-bag-size is -1: use 1"),
    ({"tst_steps": None}, "--tst-bag-size is 4 but .* pass --tst-step-ratio .* or --tst-steps"),
    ({"tst_steps": 0}, "--tst-steps is 0: phase 1 needs at least one step"),
    ({"tst_steps": TOTAL_STEPS}, "--tst-steps 12 of 12 steps leaves no step .* lower it"),
    ({"tst_steps": TOTAL_STEPS + 1}, "--tst-steps 13 of 12 steps leaves no step .* lower it"),
    ({"tst_step_ratio": 0.3}, "--tst-step-ratio 0.3 and --tst-steps 5 .* pass one of them"),
    *(
        ({"tst_steps": None, "tst_step_ratio": ratio}, f"--tst-step-ratio {message}")
        for ratio, message in {
            "0": "is 0.0: it must lie strictly between 0 and 1",
            "1": "is 1.0: it must lie strictly between 0 and 1",
            "1.5": "is 1.5: it must lie strictly between 0 and 1",
            "-0.3": "is -0.3: it must lie strictly between 0 and 1",
            "nan": "is nan: it must lie strictly between 0 and 1",
            "0.01": "0.01 of 12 steps puts the switch at step 0: raise it",
            "0.99": "0.99 of 12 steps leaves no step .* lower it",
        }.items()
    ),
    *(
        (
            {"tst_objective": objective, "tst_target_weighting": "power-law"},
            f"--tst-target-weighting power-law .* --tst-objective {objective}, .* use uniform",
        )
        for objective in ("bce", "hinge")
    ),
    ({"tst_power_law_exponent": "nan"}, "--tst-power-law-exponent is nan: use a finite number"),
    ({"tst_max_epochs": 0}, "--tst-max-epochs is 0: use a number above 0"),
    ({"tst_max_epochs": "nan"}, "--tst-max-epochs is nan: use a number above 0"),
    ({"seq_length": 0}, "--seq-length is 0: use 1 or more"),
    ({"seq_length": -32}, "--seq-length is -32: use 1 or more"),
    ({"micro_batch_size": 0}, "--micro-batch-size is 0: use 1 or more"),
    ({"global_batch_size": -4}, "--global-batch-size is -4: use 1 or more"),
    ({"data_path": None}, "--data-path is missing: pass the path of a corpus"),
    ({"data_path": "/none/text"}, "--data-path /none/text: /none/text.idx is missing. Pass"),
    ({"tokenizer_model": "/none/tok"}, "--tokenizer-model /none/tok does not exist: pass"),
    ({"tokenizer_model": "none/text/tok"}, "--tokenizer-model none/text/tok does not exist"),
]

# Flags that only a GPU takes, and what is left to do on the CPU platform.
WITHOUT_GPU: list[tuple[dict[str, Any], str]] = [
    ({name: value}, f"--{name.replace('_', '-')} {value} needs a GPU .*: {remedy}")
    for name, value, remedy in [
        ("transformer_impl", "transformer_engine", "use local"),
        ("distributed_backend", "nccl", "use gloo"),
        ("cuda_graph_impl", "local", "use none"),
        ("fp8_format", "e4m3", "remove it"),
        ("fp4_format", "e2m1", "remove it"),
        ("tst_loss_impl", "triton", "use auto"),
        ("moe_latent_size", 16, "remove it"),
        ("experimental_attention_variant", "gated_delta_net", "remove it"),
    ]
]

# They mean what their new names mean.
OLD_NAMES: list[tuple[dict[str, Any], str]] = [
    (
        {"num_layers": None, "hybrid_override_pattern": "M*-G"},
        r"--hybrid-layer-pattern M\*-G has layers that need a GPU \(G M\)",
    ),
    (
        {"hybrid_override_pattern": "*-*-", "num_layers": 2},
        "--num-layers 2 with --hybrid-layer-pattern of 4 layers does not work",
    ),
    ({"enable_cuda_graph": True}, "--cuda-graph-impl local needs a GPU"),
    ({"seq_length": None, "encoder_seq_length": 0}, "--seq-length is 0: use 1 or more"),
]

HYBRID_MODELS: list[tuple[dict[str, Any], str]] = [
    (
        {"num_layers": None, "hybrid_layer_pattern": "M*-G"},
        r"--hybrid-layer-pattern M\*-G has layers that need a GPU \(G M\) .*: use attention",
    ),
    (
        {
            "num_layers": None,
            "hybrid_layer_pattern": "*E",
            "overlap_moe_expert_parallel_comm": True,
        },
        r"--overlap-moe-expert-parallel-comm .* --hybrid-layer-pattern \*E: .* Remove one",
    ),
    (
        {"num_layers": None, "hybrid_layer_pattern": "G*-G", "tensor_model_parallel_size": 2},
        r"--hybrid-layer-pattern G\*-G .* --tensor-model-parallel-size 2 without .* Add --seq",
    ),
    (
        {
            "experimental_attention_variant": "gated_delta_net",
            "tensor_model_parallel_size": 2,
            "tst_bag_size": 1,
            "tst_steps": None,
        },
        "--experimental-attention-variant gated_delta_net .* Add --sequence-parallel",
    ),
    (
        {"num_layers": None, "hybrid_layer_pattern": "+-", "tensor_model_parallel_size": 2},
        r"--hybrid-layer-pattern \+- .* --tensor-model-parallel-size 2 without .* heads .* Add",
    ),
    (
        {
            "multi_latent_attention": True,
            "tensor_model_parallel_size": 2,
            "tst_bag_size": 1,
            "tst_steps": None,
        },
        "--multi-latent-attention does not work with --tensor-model-parallel-size 2 without .* Add",
    ),
]

# Megatron would not train on the batches as they come.
MODES: list[tuple[dict[str, Any], str]] = [
    ({"logits_save_dir": "logits"}, "--logits-save-dir logits does not work with --tst-bag-size 4"),
    (
        {"logits_save_dir": "logits", "tst_bag_size": 1, "tst_steps": None}
        | {"tst_loss_impl": "linear"},
        "--logits-save-dir logits does not work with --tst-loss-impl linear: .* Use .* auto",
    ),
    ({"moe_use_upcycling": True}, "--moe-use-upcycling does not work with --tst-bag-size 4"),
    ({"override_ckpt_iteration": 2}, "--override-ckpt-iteration 2 .* Remove it; --ckpt-step"),
]

# Megatron would not heed them, or end in an error of its own.
UNHEEDED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"--{name.replace('_', '-')}.* does not work: .*{reason}.* Remove it")
        for name, value, reason in [
            ("freeze_all_layers", True, "freezes nothing"),
            ("apply_residual_connection_post_layernorm", True, "no layer .* looks at it"),
            ("init_method_xavier_uniform", True, "--init-method-std"),
            ("config_logger_dir", "/tmp/logged", "process groups"),
            ("attention_backend", "local", "--transformer-impl local is heeded"),
            ("position_embedding_type", "mrope", "three parts"),
            ("cache_mla_latents", True, "inference"),
            ("use_ring_exchange_p2p", True, "ring_exchange"),
            ("checkpoint_activations", True, "with exit code 0"),
            ("decoder_seq_length", 16, "exchange so many positions"),
            ("inference_rng_tracker", True, "draw the same numbers"),
            ("lazy_mpu_init", True, "what it puts off"),
            ("openai_gelu", True, "no such activation"),
            ("vision_pretraining", True, "models of images"),
        ]
    ),
    (
        {"hybrid_layer_pattern": "*-*-", "num_layers": 2},
        r"--num-layers 2 with --hybrid-layer-pattern of 4 layers does not work: the pattern says",
    ),
    (
        {"hybrid_layer_pattern": "*-", "use_rope_scaling": True},
        r"--use-rope-scaling with --hybrid-layer-pattern \*- does not work: .*GPTModel",
    ),
    (
        {"hybrid_layer_pattern": "*-", "multi_latent_attention": True},
        r"--multi-latent-attention with --hybrid-layer-pattern \*- does not work: .*\(\+ is latent",
    ),
    (
        {"multi_latent_attention": True, "position_embedding_type": "yarn"},
        "--position-embedding-type yarn with --multi-latent-attention does not work: .*--rope-type",
    ),
    (
        {"hybrid_layer_pattern": "+-", "yarn_beta_fast": 16},
        "--yarn-beta-fast 16.0 with --multi-latent-attention does not work: .* of its own",
    ),
    (
        {"multi_latent_attention": True, "use_mup": True, "mup_attn_scale_power": 0.5},
        "--mup-attn-scale-power 0.5 with --multi-latent-attention does not work: .* scales",
    ),
    ({"mup_embedding_mult": 3.0}, "--mup-embedding-mult 3.0 does not work: .* --use-mup, which"),
    ({"fp16_lm_cross_entropy": True}, "--fp16-lm-cross-entropy does not work: no model here"),
    ({"mup_width_mult": 2.0}, "--mup-width-mult 2.0 does not work: .* --mup-base-hidden-size"),
    ({"position_embedding_type": "relative"}, "--position-embedding-type relative does not work"),
    (
        {"window_attn_skip_freq": 2},
        "--window-attn-skip-freq without --window-size does not work: no layer has a window",
    ),
    (
        {"hybrid_layer_pattern": "*-*-", "fp8_output_proj": True},
        r"--fp8-output-proj with --hybrid-layer-pattern \*-\*- does not work: .*GPTModel",
    ),
    (
        {"fp8_output_proj": True, "untie_embeddings_and_output_weights": None},
        "--fp8-output-proj without --untie-.* does not work: .* a weight of its own",
    ),
    (
        {"fp8_output_proj": True, "mtp_num_layers": 1, "mtp_detach_heads": True},
        "--fp8-output-proj with --mtp-detach-heads does not work: .* detached weight",
    ),
    (
        {"fp8_output_proj": True, "defer_embedding_wgrad_compute": True},
        "--fp8-output-proj with --defer-embedding-wgrad-compute does not work: .* no buffers",
    ),
    (
        {"hybrid_layer_pattern": "*-*-", "window_size": "8,0", "window_attn_skip_freq": 2},
        r"--window-attn-skip-freq 2 with --hybrid-layer-pattern \*-\*- .* \(a list with one entry",
    ),
    (
        {"hybrid_layer_pattern": "*-*-", "no_rope_freq": 2},
        r"--no-rope-freq 2 with --hybrid-layer-pattern \*-\*- does not work: .* no layer of att",
    ),
    (
        {"multi_latent_attention": True, "qk_l2_norm": True},
        "--qk-l2-norm with --multi-latent-attention does not work",
    ),
    (
        {"activation_func_clamp_value": 7.0},
        "--activation-func-clamp-value 7 is left out .*: add --no-bias-swiglu-fusion",
    ),
    (
        {"activation_func_clamp_value": 7.0, "swiglu": None},
        "--activation-func-clamp-value 7 does nothing without a gated activation: add --swiglu",
    ),
    (
        {"glu_linear_offset": 1.0, "swiglu": None},
        "--glu-linear-offset 1 does nothing without a gated activation",
    ),
    (
        {"num_experts": 4, "disable_bias_linear": None},
        "--num-experts 4 with biases does not work .*: add --disable-bias-linear",
    ),
    (
        {
            "num_experts": 4,
            "disable_bias_linear": None,
            "moe_shared_expert_intermediate_size": 32,
        },
        "--moe-shared-expert-intermediate-size 32 does not work with biases: add",
    ),
]

NON_PERSISTENT: list[tuple[dict[str, Any], str]] = [
    ({"non_persistent_ckpt_type": "local"}, "type local .* --tst-bag-size 4: .* Use global"),
    (
        {"non_persistent_save_interval": 2},
        "--non-persistent-save-interval 2 does not work without .*-type: .* Add global",
    ),
    (
        {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "/"},
        "--non-persistent-global-ckpt-dir / does not work with --save .*: .* folder of its own",
    ),
]

OPTIMIZERS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "soap"}, "--optimizer soap .* --ckpt-format torch_dist: .* Change one"),
    ({"optimizer": "dist_muon"}, "--optimizer dist_muon .* without --bf16: .* add --bf16"),
    (
        {"optimizer": "lion", "use_distributed_optimizer": True},
        "--optimizer lion .* --use-distributed-optimizer without --bf16: .* add --bf16",
    ),
    ({"optimizer": "muon", "fp16": True}, "--optimizer muon .* --fp16: .* Change one"),
    (
        {"optimizer_cpu_offload": True, "tst_reset_at_switch": "optimizer"},
        "--optimizer-cpu-offload does not work with --tst-reset-at-switch optimizer: .* Remove",
    ),
]

_DOCUMENTS = "--dataloader-inter-document-masking does not work with"
DOCUMENTS: list[tuple[dict[str, Any], str]] = [
    ({}, f"{_DOCUMENTS} --tst-bag-size 4 and --tst-document-boundary cross: .* Use .* align"),
    (
        {"tst_document_boundary": "align", "context_parallel_size": 2},
        f"{_DOCUMENTS} --context-parallel-size 2: .* Remove one",
    ),
    (
        {"tst_bag_size": 1, "tst_steps": None, "context_parallel_size": 2},
        f"{_DOCUMENTS} --context-parallel-size 2: .* Remove one",
    ),
    (
        {"tst_document_boundary": "align", "pipeline_model_parallel_size": 2},
        f"{_DOCUMENTS} --pipeline-model-parallel-size 2 and --micro-batch-size 2: .* Remove one",
    ),
    (
        {
            "tst_document_boundary": "align",
            "moe_router_load_balancing_type": "seq_aux_loss",
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        f"{_DOCUMENTS} --moe-router-load-balancing-type seq_aux_loss, .* --micro-batch-size 2: ",
    ),
    (
        {"tst_document_boundary": "align", "overlap_moe_expert_parallel_comm": True},
        f"{_DOCUMENTS} --overlap-moe-expert-parallel-comm: .* Remove one",
    ),
]


def test_documents_that_cannot_be_kept_apart(check: Check, small_run: SmallRun) -> None:
    always = {**SUPERPOSED, "dataloader_inter_document_masking": True}
    runs = [small_run.with_(**{**always, **settings}) for settings, _ in DOCUMENTS]
    assert_messages(check(runs), [message for _, message in DOCUMENTS])


LINEAR_LOSS: list[tuple[dict[str, Any], str]] = [
    ({"tst_objective": "bce"}, "--tst-loss-impl linear does not work with --tst-objective bce"),
    (
        {"overlap_moe_expert_parallel_comm": True},
        "--tst-loss-impl linear does not work with --overlap-moe-expert-parallel-comm",
    ),
    (
        {"fp8_output_proj": True},
        "--tst-loss-impl linear does not work with --fp8-output-proj",
    ),
    (
        {"defer_embedding_wgrad_compute": True},
        "--tst-loss-impl linear does not work with --defer-embedding-wgrad-compute",
    ),
    (
        {"use_torch_fsdp2": True, "tst_bag_size": 1, "tst_step_ratio": None},
        "--tst-loss-impl linear does not work with --use-torch-fsdp2: the weight is whole",
    ),
]


def test_what_needs_whole_logits(check: Check, small_run: SmallRun) -> None:
    always = {**SUPERPOSED, "tst_loss_impl": "linear"}
    runs = [small_run.with_(**{**always, **settings}) for settings, _ in LINEAR_LOSS]
    assert_messages(check(runs), [message for _, message in LINEAR_LOSS])


MULTI_TOKEN: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"tst_loss_impl": "linear"}, "--tst-loss-impl linear: Megatron counts right predictions"),
    ({"context_parallel_size": 2}, "--context-parallel-size 2: .* the end of a sequence has fewer"),
    ({"calculate_per_token_loss": True}, None),
    (
        {"calculate_per_token_loss": True, "eod_mask_loss": True},
        "--calculate-per-token-loss and --eod-mask-loss: Megatron divides",
    ),
    (
        {"calculate_per_token_loss": True, "tst_document_boundary": "align"},
        "--calculate-per-token-loss and --tst-document-boundary align: Megatron divides",
    ),
    ({"dataloader_inter_document_masking": True, "tst_document_boundary": "align"}, None),
    (
        {
            "dataloader_inter_document_masking": True,
            "calculate_per_token_loss": True,
            "tst_bag_size": 1,
            "tst_steps": None,
        },
        "--calculate-per-token-loss and --dataloader-inter-document-masking: Megatron divides",
    ),
    (
        {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": None},
        "--pipeline-model-parallel-size 2 without --untie-embeddings-and-output-weights: Megatron",
    ),
    (
        {"pipeline_model_parallel_size": 2, "tst_reset_at_switch": "embeddings"},
        "--tst-reset-at-switch embeddings and --pipeline-model-parallel-size 2: the last stage",
    ),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tm|L|"},
        "--pipeline-model-parallel-layout .*: tokens and targets reach the first and the last",
    ),
    (
        {"pipeline_model_parallel_size": 2, "defer_embedding_wgrad_compute": True},
        "--defer-embedding-wgrad-compute: Megatron would multiply the inputs of one depth by",
    ),
]


def test_what_multi_token_prediction_does_not_work_with(check: Check, small_run: SmallRun) -> None:
    always = {**SUPERPOSED, "mtp_num_layers": 1}
    runs = [small_run.with_(**{**always, **settings}) for settings, _ in MULTI_TOKEN]
    start = "--mtp-num-layers 1 does not work with "
    expected = [message and start + message for _, message in MULTI_TOKEN]
    # Before Megatron counts the depths of the pattern.
    hybrid: dict[str, Any] = {"num_layers": None, "hybrid_layer_pattern": "*-*-/*-"}
    hybrid["context_parallel_size"] = 2
    runs.append(small_run.with_(**SUPERPOSED, **hybrid))
    expected.append(r"--hybrid-layer-pattern \*-\*-/\*- does not work with --context-parallel")
    assert_messages(check(runs), expected)


def test_bad_settings(check: Check, small_run: SmallRun) -> None:
    cases = [*SETTINGS, *WITHOUT_GPU, *HYBRID_MODELS, *OLD_NAMES, *MODES, *UNHEEDED]
    cases += [*NON_PERSISTENT, *OPTIMIZERS]
    runs = [small_run.with_(**{**SUPERPOSED, **settings}) for settings, _ in cases]
    assert_messages(check(runs), [message for _, message in cases])


# Arguments of Megatron that superposition does not work with: one value that its parser takes.
CONFLICTS: dict[str, Any] = {
    "--sft": True,
    "--fim-data": True,
    "--perform-rl-step": True,
    "--reset-attention-mask": True,
    "--reset-position-ids": True,
    "--hybrid-context-parallel": True,
    "--cross-entropy-fusion-impl": "te",
    "--cuda-graph-impl": "full_iteration",
    "--dataloader-type": "cyclic",
    "--ckpt-format": "torch",
    "--rampup-batch-size": [2, 2, 8],
    "--phase-transition-iterations": "4,8",
    "--use-megatron-fsdp": True,
    "--logits-load-dir": "logits",
}


def test_conflicting_arguments(
    check: Check, small_run: SmallRun, record_property: Callable[[str, object], None]
) -> None:
    assert {conflict.flag for conflict in _CONFLICTS} == CONFLICTS.keys()
    superposed, plain, refused, taken = [], [], [], []
    conflicts = {conflict.flag: conflict for conflict in _CONFLICTS}
    for flag, value in CONFLICTS.items():
        conflict = conflicts[flag]
        setting = {conflict.flag.removeprefix("--"): value}
        superposed.append(small_run.with_(**SUPERPOSED, **setting))
        plain.append(small_run.with_(**setting))
        values = value if isinstance(value, list) else [value]
        written = re.escape(conflict.flag if value is True else f"{conflict.flag} {_text(values)}")
        always = f"{written} does not work with megatron_tst.pretrain: .* pretrain_gpt.py"
        in_phase_1 = f"{written} does not work with --tst-bag-size 4: .* Remove it"
        refused.append(always if conflict.at_any_bag_size else in_phase_1)
        # What the CPU platform refuses by itself is no matter of superposition.
        gpu_only = conflict.flag in (
            "--cuda-graph-impl",
            "--use-megatron-fsdp",
            "--reset-attention-mask",
        )
        on_cpu = f"{written} needs " if gpu_only else None
        taken.append(always if conflict.at_any_bag_size else on_cpu)
    messages = check(superposed)
    assert_messages(messages, refused)
    assert_messages(check(plain), taken)
    record_property("kind", "refused")
    for flag, message in zip(CONFLICTS, messages, strict=True):
        record_property(flag, message)


def _text(values: list[Any]) -> str:
    return " ".join(map(str, values))


def test_embedding_reset_refuses_layouts_with_several_copies(
    check: Check, small_run: SmallRun
) -> None:
    run = small_run.with_(**SUPERPOSED, tst_reset_at_switch="embeddings")
    tied = {"untie_embeddings_and_output_weights": None, "pipeline_model_parallel_size": 2}
    settings: list[dict[str, Any]] = [
        {"use_precision_aware_optimizer": True},
        {"data_parallel_random_init": True},
        tied,
    ]
    names = ["--use-precision-aware-optimizer", "--data-parallel-random-init", "tied embeddings"]
    expected = [f"{name} does not work with --tst-reset-at-switch embeddings" for name in names]
    assert_messages(check([run.with_(**one) for one in settings]), expected)


def truncate(suffix: str, size: int) -> Callable[[Path], object]:
    return lambda corpus: os.truncate(corpus.with_suffix(suffix), size)


# What happened to the files of a corpus named text.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-bin": (lambda corpus: corpus.with_suffix(".bin").unlink(), r"text\.bin is missing. Pass"),
    "no-idx": (lambda corpus: corpus.with_suffix(".idx").unlink(), r"text\.idx is missing. Pass"),
    "short-bin": (truncate(".bin", 79), r"text\.bin has 79 bytes .* truncated .* Copy the file"),
    "short-idx": (truncate(".idx", 60), r"text\.idx has 60 bytes .* truncated. Copy the file"),
    "no-index": (
        lambda corpus: corpus.with_suffix(".idx").write_text("not an index" * 9),
        r"text\.idx is not the index of a Megatron corpus .* Copy the file",
    ),
}


def test_damaged_corpora(check: Check, small_run: SmallRun, tmp_path: Path) -> None:
    runs = []
    for name, (damage, _) in DAMAGE.items():
        corpus = tmp_path / name / "text"
        corpus.parent.mkdir()
        write_corpus(corpus, [5, 3, 12])
        damage(corpus)
        # With one kind of batch or two, alone or in a blend.
        runs.append(small_run.with_(data_path=corpus))
        runs.append(small_run.with_(**SUPERPOSED, data_path=[1, small_run.corpus, 2, corpus]))
    expected = [message for _, message in DAMAGE.values() for _ in range(2)]
    assert_messages(check(runs), expected)


# What cannot be read as corpora and weights, and a part of the message.
BLENDS: list[tuple[dict[str, Any], str]] = [
    (
        {"data_path": ["50", "a", "half", "b"]},
        "--data-path 50 a half b: 50 stands where a path should. Put one number in front of each",
    ),
    ({"data_path": ["half", "a", "50", "b"]}, "--data-path half a 50 b cannot be read .*: pass"),
    ({"data_path": ["50", "a", "50"]}, "--data-path 50 a 50: 50 stands where a path should"),
    ({"data_args_path": "/none"}, "--data-path .* and --data-args-path /none cannot be read"),
    (
        {"data_path": None, "data_args_path": "/none"},
        "--data-args-path /none cannot be read .*No such file",
    ),
    (
        {"data_path": None, "per_split_data_args_path": "text.txt"},
        "--per-split-data-args-path .*text.txt cannot be read .*JSONDecodeError",
    ),
    (
        {"data_path": None, "per_split_data_args_path": "part.json"},
        "--per-split-data-args-path .*part.json cannot be read .*KeyError.* train, valid and test",
    ),
]


def test_blends_that_cannot_be_read(check: Check, small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("50 a 50 b")
    (tmp_path / "part.json").write_text('{"train": "a"}')
    runs = []
    for settings, _ in BLENDS:
        file = settings.get("per_split_data_args_path")
        own = {"per_split_data_args_path": tmp_path / file} if file else {}
        runs.append(small_run.with_(**{**SUPERPOSED, **settings, **own}))
    expected = [message for _, message in BLENDS]
    # The baseline reads the same blend as the run that it is compared with.
    for settings in ({}, SUPERPOSED):
        run = small_run.with_(**settings)
        runs.append(run.with_(data_path=[0, tmp_path / "a", 1, small_run.corpus]))
        runs.append(run.with_(data_path=[1, small_run.corpus, 1, small_run.corpus]))
        expected += [
            r"gives \S+/a the weight 0\.0: use a",
            r"names .* twice: .* sum of its weights",
        ]
    assert_messages(check(runs), expected)


# How a superposed checkpoint at step 2 (bags of 4, switch at step 5) is continued.
RESUMES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"tst_bag_size": 8}, "--tst-bag-size 4, and this command has 8"),
    ({"tst_bag_size": 1}, "--tst-bag-size 4, and this command has 1"),
    ({"tst_variant": "input-only"}, "--tst-variant full, and this command has input-only"),
    ({"tst_steps": 6}, r"at sample 20 \(step 5\), .* at sample 24 \(step 6\): pass --tst-steps 5,"),
    (
        {"train_iters": 24, "tst_steps": None, "tst_step_ratio": 0.4},
        r"\(step 10\): pass --tst-steps 5,",
    ),
    (
        {"global_batch_size": 8},
        "--global-batch-size 8 it would have been 16: pass --step-batch-size-schedule '0:4 256:8' "
        r".* \(no --tst-steps keeps the switch at sample 20, .* threshold 640\)",
    ),
    ({"seq_length": 16}, "--seq-length 32, and this command has 16"),
    ({"tst_bag_size": 8, "finetune": True}, None),
    ({"window_size": "8,0"}, r"--window-size None .*, and .* --window-size \(8, 0\) .* --finetune"),
    ({"no_rope_freq": 2}, "with --no-rope-freq None, and this command has --no-rope-freq 2, which"),
    ({"softmax_type": "off-by-one"}, "--softmax-type vanilla, and .* compute something else"),
    ({"norm_epsilon": 1e-6}, "--norm-epsilon 1e-05, and this command has 1e-06: the same weights"),
    ({"qk_l2_norm": True}, "--qk-l2-norm False, and .* compute something else"),
    ({"disable_bias_linear": None}, "--disable-bias-linear True, and .* has False: the weights do"),
    ({"use_mup": True}, "--use-mup False, and this command has True: the same weights would"),
    ({"ckpt_step": 1}, "--ckpt-step 1 names the checkpoint iter_0000001, which is not there"),
]

# What stands in the tracker file, and what is said about it.
TRACKERS: list[tuple[str, str]] = [
    ("7", r"txt names the checkpoint iter_0000007, .* not there \(found: iter_0000002\)\. Pass"),
    ("release", r"txt names the checkpoint release, which is not there"),
    ("\x00\x00", r"iteration\.txt holds .* instead of the step of the last checkpoint"),
    ("-3", r"iteration\.txt holds '-3' instead of the step"),
]


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A superposed run that stopped after its second step."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("trained")).with_(**SUPERPOSED, eval_iters=0)
    launcher.run(run.with_(exit_interval=2).argv, run.log)
    return run


@pytest.fixture(scope="module")
def stock(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of Megatron without this project that stopped after its second step."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("stock")).with_(eval_iters=0)
    launcher.run(run.with_(exit_interval=2).argv, run.log, main="tests.stock_gpt:main")
    return run


def test_continuing_with_other_settings(check: Check, trained: SmallRun) -> None:
    runs = [trained.with_(**settings) for settings, _ in RESUMES]
    assert_messages(check(runs), [message for _, message in RESUMES])


def test_superposition_is_not_turned_on_later(check: Check, stock: SmallRun) -> None:
    runs = [stock.with_(**SUPERPOSED), stock.with_(**SUPERPOSED, finetune=True), stock]
    refused = "--tst-bag-size 1, and this command has 4: .* --finetune"
    assert_messages(check(runs), [refused, None, None])


def test_trackers(check: Check, trained: SmallRun, tmp_path: Path) -> None:
    runs = []
    for index, (text, _) in enumerate(TRACKERS):
        folder = tmp_path / f"load{index}"
        shutil.copytree(trained.folder / "checkpoints", folder)
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
        runs.append(trained.with_(load=folder))
    expected: list[str | None] = [message for _, message in TRACKERS]
    # A step on the command line replaces the tracker.
    runs.append(runs[-1].with_(ckpt_step=2))
    expected.append(None)
    # Killed while the tracker was written: the last whole checkpoint is taken.
    emptied = tmp_path / "emptied"
    shutil.copytree(trained.folder / "checkpoints", emptied)
    (emptied / "iter_0000007").mkdir()
    tracker = emptied / "latest_checkpointed_iteration.txt"
    tracker.write_text("")
    runs.append(trained.with_(load=emptied))
    expected.append(None)
    # Without a tracker a new run begins, unless it must not.
    nothing = trained.with_(load=tmp_path / "nothing")
    runs += [nothing, nothing.with_(exit_on_missing_checkpoint=True)]
    expected += [None, "nothing holds no checkpoint, and --exit-on-missing-checkpoint is given: "]
    assert_messages(check(runs), expected)
    assert tracker.read_text() == "2"


def test_damaged_checkpoints(check: Check, trained: SmallRun, tmp_path: Path) -> None:
    runs = []
    for name in (".metadata", "metadata.json"):
        folder = tmp_path / f"without {name}"
        shutil.copytree(trained.folder / "checkpoints", folder)
        (folder / "iter_0000002" / name).write_text("")
        runs.append(trained.with_(load=folder))
    assert_messages(check(runs), ["iter_0000002 is damaged .* pass --ckpt-step"] * 2)


TOO_SHORT = "--data-path .* 20 tokens, and one sample of phase 1 needs 132 .* Use more data"


@pytest.fixture
def short_run(small_run: SmallRun, tmp_path: Path) -> SmallRun:
    """A run on a corpus that is shorter than one sample."""
    write_corpus(tmp_path / "short", [5, 3, 12])
    return small_run.with_(
        **SUPERPOSED,
        data_path=tmp_path / "short",
        split="100,0,0",
        eval_iters=0,
        tst_max_epochs="inf",
    )


def only_error(log: str) -> str:
    """The one line of a log that says what is wrong; there was no training."""
    assert "Traceback" not in log, log[-4000:]
    errors = [line for line in log.splitlines() if "error:" in line]
    assert len(errors) == 1, log[-4000:]
    assert "training ..." not in log.splitlines()
    return errors[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_launch_ends_with_one_line(
    launcher: Launcher, small_run: SmallRun, world_size: int
) -> None:
    run = small_run.with_(tst_bag_size=0)
    started = launcher.start(run.argv, run.log, world_size)
    assert launcher.wait(started) == [2] * world_size
    assert only_error(started.text).startswith("error: --tst-bag-size is 0: use 1 to turn")


def test_a_fault_of_the_program_keeps_its_traceback(
    launcher: Launcher, small_run: SmallRun
) -> None:
    started = launcher.start(small_run.argv, small_run.log, main="tests.internal_error:main")
    assert launcher.wait(started) == [1]
    assert "Traceback" in started.text
    last = started.text.splitlines()[-1]
    assert last == "error: rank 0, before any step: ValueError: need at least one array to stack"


# Found by argparse, by Megatron's validation, or when all arguments are known.
LAUNCHES: list[tuple[dict[str, Any], str]] = [
    ({"tst_variant": "both"}, r"--tst-variant: invalid choice: 'both' \(choose from .*output-only"),
    ({"tst_bag_sise": 4}, "unrecognized arguments: --tst-bag-sise 4"),
    ({"num_layers": None}, r"^error: Megatron cannot run .* num-layers .* \(AssertionError in /"),
    ({"hidden_size": 33}, r"^error: Megatron cannot run .* \(AssertionError in /"),
    ({"train_iters": None}, "^error: --train-iters or --train-samples is missing"),
    ({"train_iters": None, "tst_bag_size": None, "tst_steps": None}, "^error: --train-iters or"),
    (
        {"train_iters": None, "train_samples": 3, "tst_bag_size": None, "tst_steps": None},
        "^error: --train-samples 3 is less than one batch of 4",
    ),
    ({"log_interval": 0}, "^error: --log-interval 0 is not positive"),
    ({"eval_interval": 0}, "^error: --eval-interval 0 is not positive: .* --eval-iters 0"),
    ({"min_lr": 1}, r"^error: --min-lr 1\.0 is above --lr 0\.003"),
    ({"lr_wsd_decay_iters": None}, "^error: --lr-decay-style WSD .* pass --lr-wsd-decay-iters"),
    (
        {"lr_warmup_iters": None, "lr_warmup_fraction": 1.0},
        r"^error: --lr-warmup-fraction 1\.0 is not less than 1: .* a part of the run",
    ),
    (
        {
            **dict.fromkeys(("train_iters", "lr_warmup_iters", "lr_wsd_decay_iters")),
            **{"train_samples": 48, "lr_warmup_samples": 48, "lr_wsd_decay_samples": 8},
        },
        "^error: --lr-warmup-samples 48 is not less than --train-samples 48: .* a part of the run",
    ),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 60}, r"text\.bin: document 0 holds token"),
    (
        {"split": "99.999,0.001,0"},
        "^error: --data-path .*its valid split holds no tokens. .*--split 99.999,0.001,0",
    ),
    ({"split": "100,0,0"}, "^error: --eval-iters is 2 and there is no data .* --eval-iters 0"),
    (
        {"train_iters": 2_000, "tst_steps": 800},
        r"^error: --tst-max-epochs is 1 and this run reads .*text \d\.\d+ times: .* What fits: "
        r"--tst-bag-size 2 or --tst-steps \d+\. --tst-variant output-only .* use more data",
    ),
    (
        {"lr_warmup_iters": 12},
        "^error: --lr-warmup-iters 12 is not less than --train-iters 12: .* a part of the run",
    ),
    ({"padded_vocab_size": 60}, r"the vocabulary has 60\. .* raise --padded-vocab-size"),
]


def test_later_refusals(
    launcher: Launcher, small_run: SmallRun, short_run: SmallRun, tmp_path: Path
) -> None:
    cases = [
        *((small_run.with_(**{**SUPERPOSED, **settings}), line) for settings, line in LAUNCHES),
        (short_run, TOO_SHORT),
    ]
    started = [
        launcher.start(run.argv, tmp_path / f"{index}.log") for index, (run, _) in enumerate(cases)
    ]
    for process, (_, line) in zip(started, cases, strict=True):
        assert launcher.wait(process) == [2], process.text[-4000:]
        error = only_error(process.text)
        assert re.search(line, error), error


def test_help_lists_the_arguments(launcher: Launcher, tmp_path: Path) -> None:
    text = launcher.run(["--help"], tmp_path / "log.txt").text
    assert "--tst-bag-size" in text
    assert "--num-layers" in text
    # The usage stands before every error of argparse: one line, not the list of all arguments.
    usage, blank = text.splitlines()[:2]
    assert usage.startswith("usage: ")
    assert blank == ""


@pytest.mark.slow
def test_torchrun_ends_when_one_rank_finds_the_error(short_run: SmallRun) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *launch, "-m", "megatron_tst.pretrain", *short_run.argv],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode != 0
    # Rank 0 goes first; torchrun ends the other one, which waits for it or has lost it.
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr[-8000:]
    assert re.search(TOO_SHORT, errors[0]), errors[0]
    assert "training ..." not in result.stdout.splitlines()
