"""Kills a run of a TST arm behind the switch, resumes it before, and compares the losses.

    python benchmarks/gpu/resume.py --rows FILE [--tiny]

benchmarks/gpu/check.py runs it in a process of its own. The run saves once, goes on over the switch
and gets SIGKILL; the same command line then resumes. What both trained has to have the same losses.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.measuring import append  # noqa: E402
from benchmarks.gpu.training import log_of, losses_in  # noqa: E402

ARM = "TST, auto"
# The switch is at half of the steps.
STEPS, SAVED, KILLED = 20, 8, 12
# What bf16 and sums in no fixed order may do in a few steps; whether bits are equal is shown.
NEAR = 1e-3


def command(folder: Path, is_tiny: bool, *arguments: str) -> list[str]:
    """Trains the arm with checkpoints in a folder."""
    script = str(Path(__file__).parent / "training.py")
    own = [sys.executable, script, ARM, "--rows", str(folder / "rows.jsonl")]
    own += ["--steps", str(STEPS), *(["--tiny"] if is_tiny else [])]
    checkpoints = str(folder / "checkpoints")
    saved = ["--save", checkpoints, "--load", checkpoints, "--save-interval", str(SAVED)]
    return [*own, "--more", *saved, *arguments]


def train_and_kill(folder: Path, is_tiny: bool) -> dict[int, float]:
    """Losses of a run until it was killed, by step."""
    # In the group of this process, so that what ends this stage ends the run.
    process = subprocess.Popen(command(folder, is_tiny))
    losses: dict[int, float] = {}
    try:
        while max(losses, default=0) < KILLED:
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with {process.returncode} before it was killed")
            time.sleep(0.1)
            losses = losses_in(log_of(folder, ARM))
    finally:
        process.kill()
        process.wait()
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Appends a row: where the run was resumed and how far its losses lie from those before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="file to append to")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    options = parser.parse_args(argv)
    folder = options.rows.parent / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = train_and_kill(folder, options.tiny)
    # A run saves at its switch, too: the one before is to be crossed again.
    again = ("--ckpt-step", str(SAVED), "--exit-interval", str(KILLED))
    subprocess.run(command(folder, options.tiny, *again), check=True)
    after = losses_in(log_of(folder, ARM))
    shutil.rmtree(folder / "checkpoints")
    # Megatron logs the mean of the first two steps of a process as the second.
    common = sorted(before.keys() & after.keys() - {min(after) + 1})
    differences = [abs(after[step] - before[step]) / before[step] for step in common]
    row = {"what": "resume", "killed_after": max(before), "resumed_at": min(after)}
    row |= {"switch": STEPS // 2, "steps": len(common), "largest_difference": max(differences)}
    append(options.rows, row)
    crosses = min(after) == SAVED + 1 and max(common) > STEPS // 2
    if not crosses or max(differences) > NEAR:
        print(f"resumed otherwise than saved: {row}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
