"""Saves tiny Megatron models with the logits that they compute: run on one or two gloo ranks.

launcher.run([folder, "gqa-untied", ...], log, main="tests.llama_checkpoints:main")
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from megatron_tst import cpu

ITERATION = 10
VOCABULARY, PADDED_VOCABULARY = 250, 256
VARIANTS = ("gqa-untied", "gqa-tied", "mha-untied", "mha-tied")
"""Names say what a model has; ``gqa`` stands for two query heads a group."""

_ARGUMENTS = """
--num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --kv-channels 16
--seq-length 24 --max-position-embeddings 24 --micro-batch-size 1 --global-batch-size 1
--train-iters 20 --lr 1e-3 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
--disable-bias-linear --position-embedding-type rope --rotary-base 50000 --attention-dropout 0
--hidden-dropout 0 --init-method-std 0.2 --vocab-size 250 --make-vocab-size-divisible-by 64
--tokenizer-type NullTokenizer --data-path none
"""


def main() -> int:
    """Builds and saves every variant that the command line names."""
    cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    root, *variants = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    # Required by Megatron's checks of the arguments.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(3)
    for variant in variants:
        _save(Path(root) / variant, _parse(variant, ranks))
    torch.distributed.destroy_process_group()
    return 0


def _parse(variant: str, ranks: int) -> Namespace:
    from megatron.training.arguments import parse_args, validate_args

    from megatron_tst.cpu.arguments import set_cpu_defaults

    sys.argv = ["train", *_ARGUMENTS.split(), "--tensor-model-parallel-size", str(ranks)]
    if "gqa" in variant:
        sys.argv += ["--group-query-attention", "--num-query-groups", "2"]
    if "untied" in variant:
        sys.argv += ["--untie-embeddings-and-output-weights"]
    args = parse_args(set_cpu_defaults)
    validate_args(args)
    args.padded_vocab_size = PADDED_VOCABULARY
    return args


def _save(folder: Path, args: Namespace) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.checkpointing import generate_state_dict

    model = GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED_VOCABULARY,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        # Norms start at one, where exchanging them would not show.
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    tokens = torch.randint(VOCABULARY, (2, args.seq_length), generator=generator)
    positions = torch.arange(args.seq_length).expand_as(tokens)
    mask = torch.ones(args.seq_length, args.seq_length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(tokens, positions, mask)

    checkpoint = folder / f"iter_{ITERATION:07d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = generate_state_dict(args, [model], None, None, None, iteration=ITERATION)
    dist_checkpointing.save(state, str(checkpoint))
    if torch.distributed.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        torch.save({"tokens": tokens, "logits": logits}, folder / "expected.pt")
