"""Exports with Megatron at hand: compares logits and measures memory, in one rank of a launcher.

launcher.run([checkpoints, tokenizer, results], log, main="tests.hf_verification:main")
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import peak_bytes
from benchmarks.synthetic_checkpoint import write_checkpoint
from megatron_tst import cpu
from megatron_tst.checkpoint import hf_verify
from megatron_tst.checkpoint.hf_export import export_to_huggingface
from megatron_tst.checkpoint.hf_shapes import ModelShape, shape_from_arguments
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.commands import convert_megatron_to_hf
from tests.llama_checkpoints import ITERATION, VOCABULARY
from tests.older_arguments import save_as_core_0_14

VERIFIED = (
    "mha-tied",
    "gqa-untied-tp2",
    "gqa-untied-moe-ep2",
    "hybrid-gqa-untied-moe-pp2",
    "gqa-untied-moe-shared-pp2",
    "gqa-untied-moe-sigmoid-pp2",
    "transformer-engine",
    "gqa-untied-mtp",
    "hybrid-gqa-untied-mtp",
)
OLDER = ("mha-tied", "hybrid-gqa-untied-moe-pp2")
SWAPS = {
    "layers": [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)],
    "experts": [f"model.layers.2.mlp.experts.{expert}.down_proj.weight" for expert in (3, 4)],
    "gate and up": [f"model.layers.1.mlp.experts.0.{kind}_proj.weight" for kind in ("gate", "up")],
    "norms": [f"model.layers.3.self_attn.{kind}_norm.weight" for kind in "qk"],
    "keys and values": [f"model.layers.3.self_attn.{kind}_proj.weight" for kind in "kv"],
}
LARGE = ModelShape(
    layers=40,
    hidden=256,
    ffn=1024,
    heads=4,
    kv_heads=4,
    head_dim=64,
    vocabulary=256,
    padded_vocabulary=256,
    tied=False,
)
"""Its gates and ups are 84 MB in fp32."""

_GPU_RUN = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2
--group-query-attention --kv-channels 16 --qk-layernorm --use-mcore-models
--transformer-impl transformer_engine --position-embedding-type rope --normalization RMSNorm
--swiglu --disable-bias-linear --bf16 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 250
--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2
--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1
--use-distributed-optimizer --overlap-grad-reduce --recompute-granularity selective
--recompute-modules moe_act layernorm --tp-comm-overlap --fp8-format e4m3 --fp8-recipe mxfp8
--fp8-param-gather --first-last-layers-bf16 --num-experts 8 --moe-ffn-hidden-size 32
--moe-router-topk 3 --moe-router-dtype fp32 --moe-router-load-balancing-type global_aux_loss
--moe-aux-loss-coeff 1e-3 --moe-grouped-gemm --moe-token-dispatcher-type flex
--expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --moe-permute-fusion
--moe-router-fusion --moe-router-padding-for-quantization --moe-shared-expert-overlap
--moe-shared-expert-intermediate-size 32 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias
--cuda-graph-impl transformer_engine --te-rng-tracker
"""


def main() -> int:
    """Writes what it found into a JSON file."""
    checkpoints, tokenizer, results = (Path(argument) for argument in sys.argv[1:])
    work = results.parent
    cpu.activate()
    found: dict[str, Any] = {"differences": {}}
    for variant in VERIFIED:
        output = work / variant
        export_to_huggingface(checkpoints / variant, tokenizer, output)
        difference = hf_verify.largest_logit_difference(checkpoints / variant, output)
        found["differences"][variant] = difference
    found["older"] = {n: _difference_with_older_arguments(checkpoints / n, work) for n in OLDER}
    variant = "gqa-untied-moe-ep2"
    found["swaps"] = {
        name: _difference_after_swap(checkpoints / variant, work / variant, *names)
        for name, names in SWAPS.items()
    }
    found["commands"] = _commands(checkpoints / "gqa-untied", tokenizer, work)
    found["gpu run"] = _parameters_of_a_gpu_run()
    write_checkpoint(work / "large", LARGE, torch.float32)
    found["peak bytes"] = peak_bytes(
        lambda: export_to_huggingface(work / "large", tokenizer, work / "large-output")
    )
    results.write_text(json.dumps(found))
    return 0


def _difference_after_swap(checkpoint: Path, exported: Path, first: str, second: str) -> float:
    _swap(exported, first, second)
    difference = hf_verify.largest_logit_difference(checkpoint, exported)
    _swap(exported, first, second)
    return difference


def _difference_with_older_arguments(checkpoint: Path, work: Path) -> float:
    copy = Path(shutil.copytree(checkpoint, work / f"{checkpoint.name}-older"))
    save_as_core_0_14(copy / f"iter_{ITERATION:07d}")
    return hf_verify.largest_logit_difference(copy, work / checkpoint.name)


def _swap(exported: Path, first: str, second: str) -> None:
    file = exported / "model.safetensors"
    # Copies: the file is mapped, and written anew.
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, file, metadata={"format": "pt"})


def _commands(checkpoint: Path, tokenizer: Path, work: Path) -> dict[str, tuple[int, str]]:
    """Exit code and output of the tool: what it writes, and the same after a damage."""
    paths = {"checkpoint": checkpoint, "tokenizer": tokenizer}
    arguments = [*(f"--{name}={path}" for name, path in paths.items()), "--verify"]

    def command(*options: str) -> tuple[int, str]:
        return _printed(lambda: convert_megatron_to_hf.main([*arguments, *options]))

    rounded, intact = work / "rounded", work / "intact"
    found = {
        "rounded": command(f"--output={rounded}", "--dtype=bfloat16", "--verify-tolerance=0.5"),
        "intact": command(f"--output={intact}"),
    }
    _swap(intact, *(f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up")))
    verify = convert_megatron_to_hf._verify
    for number in (signal.SIGINT, signal.SIGTERM):
        output = work / number.name
        with _interrupting(number):
            found[number.name] = command(f"--output={output}")
        assert (output / "config.json").is_file()
    found["damaged"] = _printed(lambda: verify(checkpoint, intact, hf_verify.LOGIT_TOLERANCE))
    return found


@contextlib.contextmanager
def _interrupting(number: int) -> Iterator[None]:
    """Has a signal come when Megatron's model is to compute."""
    real = hf_verify._megatron_logits

    def interrupted(
        source: TorchDistCheckpoint, tokens: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        signal.raise_signal(number)
        return real(source, tokens, dtype)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    hf_verify._megatron_logits = interrupted
    try:
        yield
    finally:
        hf_verify._megatron_logits = real


def _printed(call: Callable[[], int]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code: Any = call()
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def _parameters_of_a_gpu_run() -> int:
    """Builds the model of a launch on 64 GPUs on this CPU."""
    from megatron.training.arguments import parse_args

    os.environ["WORLD_SIZE"] = "64"
    sys.argv = ["train", *_GPU_RUN.split()]
    args: Namespace = parse_args()
    args.padded_vocab_size, args.params_dtype = VOCABULARY, torch.bfloat16
    # As a checkpoint has it, after the checks of a training run.
    args.num_query_groups, args.virtual_pipeline_model_parallel_size = 2, 2
    args.add_qkv_bias = False
    assert shape_from_arguments(args, VOCABULARY).experts == 8
    with hf_verify._single_process():
        model = hf_verify._build(args)
    return sum(parameter.numel() for parameter in model.parameters())
