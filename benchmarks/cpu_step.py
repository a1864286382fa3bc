"""A training step on the CPU platform against the same model in plain PyTorch.

The plain step runs between the steps of Megatron's own loop, on the same core, so that both see the
same machine. Usage: ``python benchmarks/cpu_step.py [--steps N] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# name: vocabulary, hidden, layers, heads, feed-forward, sequence, batch, bar
MODELS: dict[str, tuple[int, int, int, int, int, int, int, float]] = {
    "127k": (256, 64, 2, 1, 160, 128, 8, 2.0),
    "9M": (8192, 256, 6, 4, 704, 256, 8, 1.3),
}
WARM_UP_STEPS = 5


def main() -> None:
    """Measures every model in its own process and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=0, help="measured steps (default: by model)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        from megatron_tst.cpu.platform import restart_with_allocator_settings

        restart_with_allocator_settings()
        _measure(options.measure, options.steps)
        return
    results = [_measured_in_a_process(model, options.steps) for model in MODELS]
    print("| model | plain PyTorch, ms | Megatron, ms | ratio | bar |")
    print("|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['model']} | {row['plain_ms']:.1f} | {row['megatron_ms']:.1f} | "
            f"{row['ratio']:.2f} | {row['bar']} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _measured_in_a_process(model: str, steps: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--measure", model, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{model} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


class _Interleaved:
    """Times Megatron's steps, and a plain step between each two of them."""

    def __init__(self, plain: Any, vocabulary: int, shape: tuple[int, int]) -> None:
        import torch

        self.plain = plain
        self.tokens = torch.randint(0, vocabulary, (shape[0], shape[1] + 1))
        self.megatron_seconds: list[float] = []
        self.plain_seconds: list[float] = []
        self._resumed_at = 0.0

    def __call__(self, step: Any) -> None:
        self.megatron_seconds.append(time.perf_counter() - self._resumed_at)
        started = time.perf_counter()
        self.plain.step(self.tokens[:, :-1], self.tokens[:, 1:])
        self.plain_seconds.append(time.perf_counter() - started)
        self._resumed_at = time.perf_counter()


def _measure(name: str, steps: int) -> None:
    from megatron_tst import cpu

    cpu.activate()
    import torch

    torch.set_num_threads(1)
    from benchmarks.plain_llama import PlainLlama, PlainTrainer
    from megatron_tst.training.pretrain import run

    vocabulary, hidden, layers, heads, ffn, length, batch, bar = MODELS[name]
    steps = steps or (800 if name == "127k" else 32)
    model = PlainLlama(vocabulary, hidden, layers, heads, ffn, length)
    timer = _Interleaved(PlainTrainer(model), vocabulary, (batch, length))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.argv = ["cpu_step", *_arguments(name, steps, Path(folder))]
        run(after_step=timer)
    megatron, plain = (
        statistics.median(seconds[WARM_UP_STEPS:]) * 1e3
        for seconds in (timer.megatron_seconds, timer.plain_seconds)
    )
    result = {
        "model": name,
        "plain_ms": plain,
        "megatron_ms": megatron,
        "ratio": megatron / plain,
        "bar": bar,
        "steps": steps,
    }
    print("RESULT " + json.dumps(result))


def _arguments(name: str, steps: int, folder: Path) -> list[str]:
    from tests.runs import SmallRun, tokenize_standard_library

    vocabulary, hidden, layers, heads, ffn, length, batch, _ = MODELS[name]
    run = SmallRun(tokenize_standard_library(folder), folder / "run").with_(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        group_query_attention=None,
        num_query_groups=None,
        seq_length=length,
        max_position_embeddings=length,
        micro_batch_size=batch,
        global_batch_size=batch,
        padded_vocab_size=vocabulary,
        train_iters=steps,
        log_interval=100,
        eval_iters=0,
        save=None,
        load=None,
    )
    return run.argv


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
