"""Memory and time of importing a Hugging Face model of a published shape.

Writes a synthetic model in bf16 (3B: 6.7 GB, 10B-A1B: 21 GB), copies its files, which is the time
to read and write the bytes, imports it, which takes as much again, and removes all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tst.checkpoint.hf_shapes import ModelShape


def main() -> int:
    from benchmarks.measuring import check_space, copy_seconds, in_a_fresh_process, write_json
    from benchmarks.synthetic_checkpoint import PARAMETERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PARAMETERS, default="3B", help="shape (default: 3B)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="import-memory-", dir=options.folder) as name:
        folder = Path(name)
        # Model and checkpoint in bf16.
        if not check_space(folder, int(4.2 * PARAMETERS[options.model])):
            return 2
        _write_model(folder / "huggingface", options.model)
        copying = copy_seconds(folder / "huggingface")
        result = in_a_fresh_process(_import, folder, options.model)
    print("| model | peak memory | before reading | time | of copying | written |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.model} | {result['peak_bytes'] / 1e9:.2f} GB | "
        f"{result['bytes_before'] / 1e9:.2f} GB | {result['seconds']:.1f} s | "
        f"{result['seconds'] / copying:.2f} | "
        f"{result['bytes'] / result['seconds'] / 1e6:.0f} MB/s |"
    )
    write_json(options.json, result | {"copy_seconds": copying})
    return 0


def _write_model(folder: Path, model: str) -> None:
    import torch

    from benchmarks.synthetic_checkpoint import SHAPES
    from megatron_tst.checkpoint.hf_mapping import KeyLayout, weight_slices
    from megatron_tst.checkpoint.safetensors_writer import PlannedWeight, SafetensorsWriter

    shape = SHAPES[model]
    weights = {
        name: PlannedWeight(size, torch.bfloat16)
        for part in weight_slices(shape, KeyLayout())
        for name, size in part.sizes().items()
    }
    folder.mkdir()
    writer = SafetensorsWriter(weights, "5GB")
    writer.start(folder)
    values = torch.randn(1 << 20).bfloat16()
    for name, weight in weights.items():
        repeated = values.repeat(-(-weight.elements >> 20))[: weight.elements]
        writer.write(name, repeated.view(weight.size))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(_config(shape)))


def _config(shape: ModelShape) -> dict[str, Any]:
    config = {
        "architectures": [shape.architecture],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    of_experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": shape.ffn,
        "norm_topk_prob": True,
    }
    return config | (of_experts if shape.experts else {})


def _import(folder: Path, model: str) -> dict[str, Any]:
    from benchmarks.measuring import process_peak_bytes, removed_afterwards
    from benchmarks.synthetic_checkpoint import PARAMETERS
    from megatron_tst.checkpoint.hf_arguments import parse_arguments
    from megatron_tst.checkpoint.hf_import import import_from_huggingface

    # Megatron's imports, which no size of a model changes.
    parse_arguments([])
    before = process_peak_bytes()
    with removed_afterwards(folder / "megatron") as output:
        start = time.perf_counter()
        result = import_from_huggingface(folder / "huggingface", output)
        seconds = time.perf_counter() - start
        assert result.parameters == PARAMETERS[model]
        return {
            "bytes": sum(file.stat().st_size for file in output.glob("release/*")),
            "seconds": seconds,
            "bytes_before": before,
            "peak_bytes": process_peak_bytes(),
        }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
