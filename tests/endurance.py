"""Hours of short runs that are killed, stopped and resumed, compared with undisturbed ones.

    python -m tests.endurance [--minutes 120] [--seed 0] [--folder FOLDER]

Every round trains one run twice: undisturbed, and with kills and stops at random moments (in both
phases, at the switch, while saving), each followed by a resume. In half of the rounds every resume
has another layout. The losses of the two are compared: equal to the bit at one layout, close at
several. What each rank reads is recorded: no sample may be lost or read twice, counting the steps
that are kept. A long run beside them shows whether memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.runs import SmallRun, tokenize_standard_library
from tests.survival import MAIN, kill, last_checkpoint
from tests.zygote import Launcher, Run

STEPS, SWITCH, BATCH = 240, 96, 4
# Losses in fp32 after resumes at other layouts: sums in another order, grown over 240 steps.
CLOSE = 1e-3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP 2": (2, {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}),
    "TP 2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
}
# The distributed optimizer's state does not load without it, nor the other way round.
PLAIN_LAYOUTS = ("one process", "TP 2", "PP 2")
COMMON: dict[str, Any] = {
    "tst_bag_size": 4,
    "tst_steps": SWITCH,
    "train_iters": STEPS,
    "global_batch_size": BATCH,
    "save_interval": 20,
    "eval_interval": 30,
    "eval_iters": 2,
    "hidden_dropout": 0.0,
    "exit_signal_handler": True,
    "num_workers": 0,
    # With a larger one rounding grows tenfold in sixteen steps.
    "lr": 3e-4,
}


@dataclass
class Attempt:
    """One start of a run.

    Attributes:
        layout: key of ``LAYOUTS``.
        first_step: steps that its checkpoint had.
        reads: where its ranks recorded what they read.
    """

    layout: str
    first_step: int
    reads: Path


@dataclass
class Tally:
    """What happened so far."""

    rounds: int = 0
    attempts: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    worst_deviation: float = 0.0
    samples: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Runs rounds until the time is over; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of kills and layouts")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    tally, chance = Tally(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        corpus, launcher = tokenize_standard_library(folder), Launcher()
        try:
            with _long_run(launcher, corpus, folder / "long", options.minutes) as memory:
                while time.monotonic() < end:
                    play_round(launcher, corpus, folder / f"{tally.rounds}", chance, tally)
                    print(_line(tally), flush=True)
        finally:
            launcher.close()
    print(memory.report())
    for fault in tally.faults:
        print(f"FAULT: {fault}")
    return 1 if tally.faults or memory.grows else 0


def play_round(
    launcher: Launcher, corpus: Path, folder: Path, chance: random.Random, tally: Tally
) -> None:
    """Trains a run undisturbed and disturbed, and compares."""
    changes_layout = tally.rounds % 2 == 1
    layout = chance.choice(list(PLAIN_LAYOUTS if changes_layout else LAYOUTS))
    settings = {**COMMON, "seed": 100 + tally.rounds}
    reference = SmallRun(corpus, folder / "reference").with_(**settings)
    processes, arguments = LAYOUTS[layout]
    launcher.run(
        reference.with_(**arguments).argv,
        reference.log,
        processes,
        main=MAIN,
        environment={"RECORD_READS": str(folder / "reference/reads")},
    )
    disturbed = reference.with_(folder / "disturbed", save_interval=chance.choice([7, 20, 45]))
    attempts: list[Attempt] = []
    while not attempts or _steps_done(disturbed) < STEPS:
        if attempts and changes_layout:
            layout = chance.choice(PLAIN_LAYOUTS)
        attempts.append(_attempt(launcher, disturbed, layout, len(attempts), chance, tally))
    tally.rounds += 1
    where = f"round {tally.rounds} ({', '.join(attempt.layout for attempt in attempts)})"
    tally.faults += [f"{where}: {fault}" for fault in _loss_faults(reference, disturbed, attempts)]
    tally.worst_deviation = max(tally.worst_deviation, _deviation(reference, disturbed))
    tally.faults += [f"{where}: {fault}" for fault in _read_faults(folder, attempts)]
    tally.samples += STEPS * BATCH


def _attempt(
    launcher: Launcher,
    run: SmallRun,
    layout: str,
    number: int,
    chance: random.Random,
    tally: Tally,
) -> Attempt:
    """Starts a run, and ends it at a random moment unless it ends by itself before."""
    processes, arguments = LAYOUTS[layout]
    found = Attempt(layout, _steps_done(run), run.folder / f"reads-{number}")
    started = launcher.start(
        run.with_(**arguments).argv,
        run.folder / f"log-{number}.txt",
        processes,
        main=MAIN,
        environment={"RECORD_READS": str(found.reads)},
    )
    how = _disturb(launcher, started, found.first_step, chance)
    tally.attempts += 1
    tally.ends[how] += 1
    tally.layouts[layout] += 1
    if how == "by itself" and any(started.exit_codes.values()):
        raise RuntimeError(f"{started.log} ended by itself:\n{started.text[-4000:]}")
    return found


def _disturb(launcher: Launcher, started: Run, first_step: int, chance: random.Random) -> str:
    how = chance.choice(["kill", "kill", "kill at the switch", "SIGTERM", "nothing"])
    if how == "kill at the switch" and first_step >= SWITCH:
        how = "kill"
    step = SWITCH if how == "kill at the switch" else chance.randint(first_step + 1, STEPS)
    while how != "nothing" and not started.finished and not _has_logged(started, step):
        time.sleep(0.002)
        if not psutil.pid_exists(started.pids[0]):
            break
    # From the log line of a step to the end of its save.
    time.sleep(chance.random() * 0.2)
    if how == "nothing":
        launcher.wait(started, 600)
        return "by itself"
    if how == "SIGTERM":
        try:
            started.kill(0, signal.SIGTERM)
        except ProcessLookupError:
            # It was at its last step, and has ended meanwhile.
            how = "by itself"
        launcher.wait(started, 600)
        return how
    kill(launcher, started)
    return how


def _has_logged(started: Run, step: int) -> bool:
    # A rank makes the log when it starts.
    return started.log.is_file() and f"step {step:8d}/" in started.text


def _steps_done(run: SmallRun) -> int:
    checkpoints = run.folder / "checkpoints"
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return 0
    if tracker.read_text():
        return last_checkpoint(run)
    # Killed while it was written: a resume takes the last whole one.
    whole = sorted(path.parent.name for path in checkpoints.glob("iter_*/.metadata"))
    return int(whole[-1].removeprefix("iter_"))


# --- what is compared -----------------------------------------------------------------------------


def _loss_faults(
    reference: SmallRun, disturbed: SmallRun, attempts: list[Attempt]
) -> Iterator[str]:
    expected, found = (run.scalars() for run in (reference, disturbed))
    for tag in ("lm loss", "lm loss validation"):
        if expected[tag].keys() != found[tag].keys():
            yield f"steps of {tag} differ: {sorted(expected[tag].keys() ^ found[tag].keys())[:5]}"
    is_one_layout = len({attempt.layout for attempt in attempts}) == 1
    worst = _deviation(reference, disturbed)
    if worst > (0.0 if is_one_layout else CLOSE):
        yield f"losses differ by up to {worst:.3g} of their size"


def _deviation(reference: SmallRun, disturbed: SmallRun) -> float:
    expected, found = (run.scalars() for run in (reference, disturbed))
    return max(
        abs(found[tag][step] / value - 1)
        for tag in ("lm loss", "lm loss validation")
        for step, value in expected[tag].items()
        if step in found[tag]
    )


def _read_faults(folder: Path, attempts: list[Attempt]) -> Iterator[str]:
    """Samples of kept steps that were not read once each, or are other text than undisturbed."""
    reference = _reads(folder / "reference/reads")
    ends = [attempt.first_step for attempt in attempts[1:]] + [STEPS]
    for attempt, end in zip(attempts, ends, strict=True):
        kept = range(attempt.first_step * BATCH, end * BATCH)
        # Both ends of a pipeline read.
        times = 2 if attempt.layout == "PP 2" else 1
        reads = _reads(attempt.reads) if kept else {}
        for index in kept:
            if len(reads.get(index, [])) != times:
                yield f"sample {index} was read {len(reads.get(index, []))} times, not {times}"
                return
            if set(reads[index]) != set(reference[index]):
                yield f"sample {index} is other text: {reads[index][0]}, {reference[index][0]}"
                return


def _reads(folder: Path) -> Mapping[int, list[tuple[int, int]]]:
    """What was read by index of the sample: where it begins in the stream, and its tokens."""
    found: dict[int, list[tuple[int, int]]] = {}
    for path in folder.glob("rank*"):
        # A killed rank may leave half a line.
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                found.setdefault(entry["index"], []).append((entry["begin"], entry["tokens"]))
    return found


# --- memory ---------------------------------------------------------------------------------------


class Memory:
    """Resident memory of a process by time."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.points: list[tuple[float, float]] = []

    def sample(self) -> None:
        """Notes what it is now, in MB."""
        try:
            self.points.append((time.monotonic(), self._process.memory_info().rss / 1e6))
        except psutil.Error:
            return

    @property
    def slope(self) -> float:
        """MB an hour over the second half."""
        half = np.array(self.points[len(self.points) // 2 :])
        return float(3600 * np.polyfit(half[:, 0], half[:, 1], 1)[0])

    @property
    def grows(self) -> bool:
        """Whether a run of a week would need more than some hundred MB."""
        return self.slope > 5

    def report(self) -> str:
        """One line."""
        return (
            f"memory of the long run: {self.points[0][1]:.0f} MB, then {self.points[-1][1]:.0f} MB "
            f"after {(self.points[-1][0] - self.points[0][0]) / 60:.0f} minutes; slope of the "
            f"second half {self.slope:+.2f} MB an hour"
        )


@contextmanager
def _long_run(launcher: Launcher, corpus: Path, folder: Path, minutes: float) -> Iterator[Memory]:
    """A run of both phases beside the rounds, which evaluates and saves; longer than they last."""
    steps = round(3000 * minutes)
    long = {
        "train_iters": steps,
        "tst_steps": round(600 * minutes),
        "tst_max_epochs": "inf",
        "save_interval": 500,
        "eval_interval": 500,
        # Keeps the last checkpoint only.
        "save_retain_interval": 10_000_000,
    }
    run = SmallRun(corpus, folder).with_(**{**COMMON, **long})
    started = launcher.start(run.argv, run.log)
    memory, is_over = Memory(started.pids[0]), threading.Event()

    def watch() -> None:
        # Its first steps make caches.
        while not _has_logged(started, 50) and not is_over.is_set():
            time.sleep(1)
        while not is_over.wait(5):
            memory.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()
        kill(launcher, started)


def _line(tally: Tally) -> str:
    ends = ", ".join(f"{count} {how}" for how, count in sorted(tally.ends.items()))
    layouts = ", ".join(f"{count} {name}" for name, count in sorted(tally.layouts.items()))
    return (
        f"{tally.rounds} rounds, {tally.attempts} starts ({layouts}), ended: {ends}; "
        f"{tally.samples} samples counted; largest deviation {tally.worst_deviation:.2g}; "
        f"{len(tally.faults)} faults"
    )


if __name__ == "__main__":
    sys.exit(main())
