"""Saves tiny Megatron models with the logits that they compute: run on one or two gloo ranks.

launcher.run([folder, "gqa-untied", ...], log, main="tests.llama_checkpoints:main")
"""

from __future__ import annotations

import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_tst import cpu

ITERATION = 10
VOCABULARY, PADDED_VOCABULARY = 250, 256
DENSE_VARIANTS = ("gqa-untied", "gqa-tied", "mha-untied", "mha-tied", "gqa-untied-qknorm")
VARIANTS = (
    *DENSE_VARIANTS,
    *("gqa-untied-moe", "hybrid-gqa-untied", "hybrid-gqa-tied-moe"),
    *("gqa-untied-mtp", "hybrid-gqa-untied-mtp"),
)
"""Names say what a model has; ``gqa`` stands for two query heads a group, ``hybrid`` for
Megatron's HybridModel."""
PARALLEL_VARIANTS = (
    "gqa-untied-dp2",
    "gqa-untied-tp2",
    "gqa-untied-pp2",
    "gqa-tied-pp2",
    "gqa-untied-moe-pp2",
    "gqa-untied-moe-ep2",
    "hybrid-gqa-untied-moe-pp2",
    "gqa-untied-moe-shared-pp2",
    "gqa-untied-moe-sigmoid-pp2",
    "hybrid-gqa-untied-moe-sigmoid-pp2",
)
"""On two ranks."""

_ARGUMENTS = """
--hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --kv-channels 16
--seq-length 24 --max-position-embeddings 24 --micro-batch-size 1 --global-batch-size 2
--train-iters 20 --lr 1e-3 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
--disable-bias-linear --position-embedding-type rope --rotary-base 50000 --attention-dropout 0
--hidden-dropout 0 --init-method-std 0.2 --vocab-size 250 --make-vocab-size-divisible-by 64
--tokenizer-type NullTokenizer --data-path none
"""
_MOE_ARGUMENTS = """
--num-experts 6 --moe-ffn-hidden-size 40 --moe-router-topk 3 --moe-router-score-function softmax
--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
"""
# Qwen2-MoE's and GLM-4's.
_SHARED_ARGUMENTS = """
--moe-shared-expert-intermediate-size 56 --moe-shared-expert-gate --moe-router-pre-softmax
--add-qkv-bias --moe-layer-freq [1,0,1,1]
"""
_SIGMOID_ARGUMENTS = """
--moe-shared-expert-intermediate-size 80 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.5 --moe-router-topk 2
--moe-router-num-groups 3 --moe-router-group-topk 1 --rotary-percent 0.5
"""
_LAYERS = 4


def main() -> int:
    """Builds and saves every variant that the command line names."""
    cpu.activate()
    root, *variants = sys.argv[1:]
    # Required by Megatron's checks of the arguments.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.distributed.init_process_group("gloo")
    for variant in variants:
        build_and_save(Path(root) / variant, parse_variant(variant))
    torch.distributed.destroy_process_group()
    return 0


def parse_variant(variant: str) -> Namespace:
    """Megatron's arguments of a variant, for the ranks that there are."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_tst.cpu.arguments import set_cpu_defaults

    words = variant.split("-")
    sys.argv = ["train", *_ARGUMENTS.split()]
    if "hybrid" in words:
        halves = ["*E" if "moe" in words else "*-"] * _LAYERS
        stages = 2 if "pp2" in words else 1
        size = _LAYERS // stages
        pattern = "|".join("".join(halves[:size]) for _ in range(stages))
        sys.argv += ["--hybrid-layer-pattern", pattern + ("/*-" if "mtp" in words else "")]
    else:
        sys.argv += ["--num-layers", str(_LAYERS)]
        if "mtp" in words:
            sys.argv += ["--mtp-num-layers", "2"]
    if "moe" in words:
        sys.argv += _MOE_ARGUMENTS.split()
        if "shared" in words:
            sys.argv += _SHARED_ARGUMENTS.split()
        else:
            sys.argv += ["--qk-layernorm"]
        if "sigmoid" in words:
            sys.argv += _SIGMOID_ARGUMENTS.split()
            if "hybrid" not in words:
                sys.argv += ["--moe-layer-freq", "[0,1,1,1]", "--add-qkv-bias"]
    if "qknorm" in words:
        sys.argv += ["--qk-layernorm"]
    if "gqa" in words:
        sys.argv += ["--group-query-attention", "--num-query-groups", "2"]
    if "untied" in words:
        sys.argv += ["--untie-embeddings-and-output-weights"]
    for word, name in (("tp2", "tensor"), ("pp2", "pipeline"), ("ep2", "expert")):
        if word in words:
            sys.argv += [f"--{name}-model-parallel-size", "2"]
    args = parse_args(set_cpu_defaults)
    validate_args(args)
    args.padded_vocab_size = PADDED_VOCABULARY
    return args


def build_and_save(folder: Path, args: Namespace) -> None:
    """Saves a model of random weights and, in ``expected.pt``, its logits of random tokens."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.checkpointing import generate_state_dict

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(3 + stage)
    model_parallel_cuda_manual_seed(3 + stage)
    model = build_model(args)
    _randomize(model, stage, parallel_state.get_expert_model_parallel_rank())
    tokens = torch.randint(
        VOCABULARY, (2, args.seq_length), generator=torch.Generator().manual_seed(5)
    )
    logits = logits_of(model, tokens)

    checkpoint = folder / f"iter_{ITERATION:07d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = generate_state_dict(args, [model], None, None, None, iteration=ITERATION)
    # Megatron's default: replicas share the work of writing.
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(state, str(checkpoint), strategy)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        torch.save({"tokens": tokens, "logits": logits}, folder / "expected.pt")
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()


def build_model(args: Namespace) -> Any:
    """Megatron's model as its own training script builds it, one stage of it on each rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder

    from megatron_tst.model.config import model_config_from_args

    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = HybridModelBuilder if args.hybrid_layer_pattern else GPTModelBuilder
    config = model_config_from_args(args)
    config.parallel_output = False
    config.finalize()
    return builder(config).build_model(groups)


def _randomize(model: Any, stage: int, expert_rank: int) -> None:
    """Replaces what would be equal in two places, where exchanging them would not show."""
    same = torch.Generator().manual_seed(5 + stage)
    own = torch.Generator().manual_seed(50 + 10 * stage + expert_rank)
    for name, parameter in model.named_parameters():
        # Norms start at one, and the experts of all ranks at the same weights.
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=same)
        elif "experts" in name:
            parameter.data.normal_(0, 0.2, generator=own)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.2, generator=same)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.uniform_(-0.3, 0.3, generator=same)


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits, on the ranks of the last pipeline stage."""
    from megatron.core import parallel_state

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not first:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad():
        output: torch.Tensor = model(tokens, positions, mask)
    if not last:
        torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return output if last else None


def rename_as_transformer_engine(folder: Path) -> None:
    """Renames what a mixture of experts of Transformer Engine's modules saves under other names.

    Those modules need a GPU: the names are from Megatron's sources and the weights are the same.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    file = folder / ".metadata"
    index = pickle.loads(file.read_bytes())

    def rename(key: str) -> str:
        return key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")

    index.state_dict_metadata = {
        rename(key): entry for key, entry in index.state_dict_metadata.items()
    }
    index.storage_data = {
        MetadataIndex(rename(place.fqn), place.offset, place.index): stored
        for place, stored in index.storage_data.items()
    }
    # Each of its modules has a state besides the weights.
    state = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4"
    index.state_dict_metadata[state] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(state)] = next(iter(index.storage_data.values()))
    file.write_bytes(pickle.dumps(index))
