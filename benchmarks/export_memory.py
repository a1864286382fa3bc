"""Memory and time of exporting a checkpoint of a published shape to Hugging Face format.

Writes a synthetic checkpoint in bf16 (3B: 6.7 GB, 10B-A1B: 21 GB), copies its files, which is the
time to read and write the bytes, exports it, which takes as much again, and removes all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TABLE = (
    "| model | largest file | files | peak memory | time | of copying | written |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> int:
    from benchmarks.measuring import check_space, write_json
    from benchmarks.synthetic_checkpoint import PARAMETERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PARAMETERS, default="3B", help="shape (default: 3B)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--max-shard-size", nargs="+", default=["5GB", "1GB"])
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-memory-", dir=options.folder) as folder:
        # Checkpoint and export in bf16.
        if not check_space(Path(folder), int(4.2 * PARAMETERS[options.model])):
            return 2
        results = _measure_all(Path(folder), options.model, options.max_shard_size)
    write_json(options.json, results)
    return 0


def _measure_all(folder: Path, model: str, shard_sizes: list[str]) -> dict[str, dict[str, float]]:
    from benchmarks.measuring import copy_seconds, in_a_fresh_process
    from benchmarks.synthetic_checkpoint import SHAPES, save_tokenizer, write_checkpoint

    shape = SHAPES[model]
    write_checkpoint(folder / "megatron", shape)
    save_tokenizer(folder / "tokenizer", shape.vocabulary)
    print(TABLE)
    results = {}
    for size in shard_sizes:
        copying = copy_seconds(folder / "megatron")
        result = in_a_fresh_process(_export, folder, model, size)
        results[size] = result | {"copy_seconds": copying}
        print(
            f"| {model} | {size} | {result['files']} | {result['peak_bytes'] / 1e9:.2f} GB | "
            f"{result['seconds']:.1f} s | {result['seconds'] / copying:.2f} | "
            f"{result['bytes'] / result['seconds'] / 1e6:.0f} MB/s |",
            flush=True,
        )
    return results


def _export(folder: Path, model: str, max_shard_size: str) -> dict[str, Any]:
    from benchmarks.measuring import process_peak_bytes, removed_afterwards
    from benchmarks.synthetic_checkpoint import PARAMETERS
    from megatron_tst.checkpoint.hf_export import export_to_huggingface

    with removed_afterwards(folder / "huggingface") as output:
        start = time.perf_counter()
        result = export_to_huggingface(
            folder / "megatron", folder / "tokenizer", output, max_shard_size=max_shard_size
        )
        seconds = time.perf_counter() - start
        assert result.parameters == PARAMETERS[model]
        files = list(output.glob("*.safetensors"))
        return {
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
            "seconds": seconds,
            "peak_bytes": process_peak_bytes(),
        }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
