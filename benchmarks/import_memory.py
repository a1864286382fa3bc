"""Memory and time of importing a 3B-shaped Hugging Face model as a Megatron checkpoint.

Writes a synthetic model of 6.7 GB and its import, another 6.7 GB, and removes both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    from benchmarks.export_memory import PARAMETERS
    from benchmarks.measuring import write_json

    folder = Path(tempfile.mkdtemp(prefix="import-memory-", dir=options.folder))
    try:
        # Model and checkpoint in bf16.
        needed, free = int(4.2 * PARAMETERS), shutil.disk_usage(folder).free
        if free < needed:
            print(f"error: {folder} needs {needed:,} bytes free and has {free:,}", file=sys.stderr)
            return 2
        _write_model(folder / "huggingface")
        # A fresh process, which has no memory of anything else.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(_import, (folder,))
    finally:
        shutil.rmtree(folder)
    print("| peak memory | before reading | time | written |")
    print("|---|---|---|---|")
    print(
        f"| {result['peak_bytes'] / 1e9:.2f} GB | {result['bytes_before'] / 1e9:.2f} GB | "
        f"{result['seconds']:.1f} s | {result['bytes'] / result['seconds'] / 1e6:.0f} MB/s |"
    )
    write_json(options.json, result)
    return 0


def _write_model(folder: Path) -> None:
    import torch

    from benchmarks.export_memory import SHAPE
    from megatron_tst.checkpoint.hf_mapping import KeyLayout, weight_slices
    from megatron_tst.checkpoint.hf_shapes import ModelShape
    from megatron_tst.checkpoint.safetensors_writer import PlannedWeight, SafetensorsWriter

    shape = ModelShape(**SHAPE)
    weights = {
        name: PlannedWeight(size, torch.bfloat16)
        for part in weight_slices(shape, KeyLayout())
        for name, size in part.sizes().items()
    }
    folder.mkdir()
    writer = SafetensorsWriter(weights, "5GB")
    writer.start(folder)
    for name, weight in weights.items():
        writer.write(
            name,
            torch.randn(1 << 20)
            .bfloat16()
            .repeat(-(-weight.elements >> 20))[: weight.elements]
            .view(weight.size),
        )
    writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _import(folder: Path) -> dict[str, Any]:
    from benchmarks.export_memory import PARAMETERS
    from megatron_tst.checkpoint.hf_arguments import parse_arguments
    from megatron_tst.checkpoint.hf_import import import_from_huggingface

    # Megatron's imports, which no size of a model changes.
    parse_arguments([])
    before = _status("VmHWM")
    start = time.perf_counter()
    result = import_from_huggingface(folder / "huggingface", folder / "megatron")
    seconds = time.perf_counter() - start
    assert result.parameters == PARAMETERS
    return {
        "bytes": sum(file.stat().st_size for file in folder.glob("megatron/release/*")),
        "seconds": seconds,
        "bytes_before": before,
        "peak_bytes": _status("VmHWM"),
    }


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
