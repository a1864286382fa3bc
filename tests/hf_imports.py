"""What Megatron makes of imported models, in the ranks of a launcher.

launcher.run([cases.json], log, world_size, main="tests.hf_imports:compute_logits")
launcher.run([cases.json, results.json], log, main="tests.hf_imports:convert")
launcher.run([folder, results.json], log, main="tests.hf_imports:measure")
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measuring import peak_bytes
from megatron_tst import cpu
from megatron_tst.checkpoint.hf_import import import_from_huggingface
from megatron_tst.checkpoint.hf_mapping import KeyLayout, weight_slices
from megatron_tst.checkpoint.hf_shapes import ModelShape
from megatron_tst.commands import convert_hf_to_megatron
from tests.llama_checkpoints import build_model, logits_of

LARGE = ModelShape(
    layers=32,
    hidden=256,
    ffn=1024,
    heads=4,
    kv_heads=4,
    head_dim=64,
    vocabulary=256,
    padded_vocabulary=256,
    tied=False,
)
"""Its gates and ups are 67 MB in fp32."""
# What a launch needs besides the model.
_RUN = """
--seq-length 24 --micro-batch-size 1 --global-batch-size 2 --train-iters 20 --lr 1e-3
--data-path none
"""


def convert() -> int:
    """Runs the tool with every command line; writes exit codes and what was printed."""
    cases, results = (Path(argument) for argument in sys.argv[1:])
    found = []
    for argv in json.loads(cases.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = convert_hf_to_megatron.main(argv)
        found.append((code, printed.getvalue()))
    results.write_text(json.dumps(found))
    return 0


def compute_logits() -> int:
    """Builds each model, loads it as Megatron's training does, and saves its logits."""
    from megatron.core import parallel_state

    cpu.activate()
    # Required by Megatron's checks of the arguments.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.distributed.init_process_group("gloo")
    for case in json.loads(Path(sys.argv[1]).read_text()):
        logits = _load_and_compute(case["arguments"], torch.tensor(case["tokens"]))
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(logits, case["output"])
        parallel_state.destroy_model_parallel()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def _load_and_compute(arguments: list[str], tokens: torch.Tensor) -> torch.Tensor | None:
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint
    from megatron.training.global_vars import set_args

    from megatron_tst.cpu.arguments import set_cpu_defaults

    sys.argv = ["train", *_RUN.split(), *arguments]
    args = parse_args(set_cpu_defaults)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args)
    validate_args(args)
    set_args(args)
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    model = build_model(args)
    assert load_checkpoint([model], None, None) == (0, 0)
    return logits_of(model, tokens)


def measure() -> int:
    """Writes the memory that importing a larger model takes."""
    folder, results = (Path(argument) for argument in sys.argv[1:])
    source = folder / "large"
    source.mkdir()
    sizes = {
        name: size
        for part in weight_slices(LARGE, KeyLayout())
        for name, size in part.sizes().items()
    }
    save_file(
        {name: torch.ones(size) for name, size in sizes.items()}, source / "model.safetensors"
    )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": LARGE.vocabulary,
        "hidden_size": LARGE.hidden,
        "intermediate_size": LARGE.ffn,
        "num_hidden_layers": LARGE.layers,
        "num_attention_heads": LARGE.heads,
    }
    (source / "config.json").write_text(json.dumps(config))
    # Imports and Megatron's parser take memory of their own, once.
    import_from_huggingface(source, folder / "first")
    peaks = [
        peak_bytes(partial(import_from_huggingface, source, folder / kind, kind=kind))
        for kind in ("gpt", "hybrid")
    ]
    results.write_text(json.dumps(peaks))
    return 0
