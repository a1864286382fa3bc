"""Memory and time of exporting a 3B-shaped checkpoint to Hugging Face format.

Writes a synthetic checkpoint of 6.7 GB and its export, another 6.7 GB, and removes both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARAMETERS = 3_337_766_912
SHAPE: dict[str, Any] = {
    "layers": 36,
    "hidden": 2048,
    "ffn": 11008,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 128,
    "vocabulary": 128256,
    "padded_vocabulary": 128256,
    "tied": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--max-shard-size", nargs="+", default=["5GB", "1GB"])
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    from benchmarks.measuring import write_json

    folder = Path(tempfile.mkdtemp(prefix="export-memory-", dir=options.folder))
    try:
        # Checkpoint and export in bf16.
        needed, free = int(4.2 * PARAMETERS), shutil.disk_usage(folder).free
        if free < needed:
            print(f"error: {folder} needs {needed:,} bytes free and has {free:,}", file=sys.stderr)
            return 2
        results = _measure_all(folder, options.max_shard_size)
    finally:
        shutil.rmtree(folder)
    write_json(options.json, results)
    return 0


def _measure_all(folder: Path, shard_sizes: list[str]) -> dict[str, dict[str, float]]:
    from benchmarks.synthetic_checkpoint import save_tokenizer, write_checkpoint
    from megatron_tst.checkpoint.hf_shapes import ModelShape

    shape = ModelShape(**SHAPE)
    write_checkpoint(folder / "megatron", shape)
    save_tokenizer(folder / "tokenizer", shape.vocabulary)
    print("| largest file | files | peak memory | time | written |")
    print("|---|---|---|---|---|")
    results = {}
    for size in shard_sizes:
        # A fresh process, which has no memory of another export.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(_export, (folder, size))
        shutil.rmtree(folder / "huggingface")
        results[size] = result
        speed = result["bytes"] / result["seconds"] / 1e6
        peak = result["peak_bytes"] / 1e9
        print(
            f"| {size} | {result['files']} | {peak:.2f} GB | {result['seconds']:.1f} s | "
            f"{speed:.0f} MB/s |",
            flush=True,
        )
    return results


def _export(folder: Path, max_shard_size: str) -> dict[str, Any]:
    from megatron_tst.checkpoint.hf_export import export_to_huggingface

    output = folder / "huggingface"
    start = time.perf_counter()
    result = export_to_huggingface(
        folder / "megatron", folder / "tokenizer", output, max_shard_size=max_shard_size
    )
    seconds = time.perf_counter() - start
    assert result.parameters == PARAMETERS
    files = list(output.glob("*.safetensors"))
    status = Path("/proc/self/status").read_text()
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": seconds,
        "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0]),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
