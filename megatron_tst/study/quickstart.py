"""The two arms of the quickstart: their settings, and how they are trained within a time."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from rich.console import Console

from megatron_tst.common.precision import Precision
from megatron_tst.common.progress import TaskProgress
from megatron_tst.study.execution import Execution, Slot, cores_of_this_process
from megatron_tst.study.pace import Plan, choose_steps, measure_pace
from megatron_tst.study.run_folder import RunFolder
from megatron_tst.study.runner import Progress, run_all


@dataclass(frozen=True)
class Settings:
    """Model, text and schedule of both arms; the defaults are the byte-level quickstart."""

    vocabulary: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 1
    ffn: int = 160
    length: int = 128
    batch: int = 8
    steps: int = 12_000
    learning_rate: float = 1e-3
    bag_size: int = 2
    step_ratio: float = 0.3
    text_bytes: int = 40_000_000
    seed: int = 0
    precision: Precision = "bf16"

    @property
    def validation_batches(self) -> int:
        """Batches of the validation text that are evaluated each time."""
        return min(max(self.steps // 4, 1), 100)

    @property
    def evaluations(self) -> int:
        """How many times; a shorter run reads as much text each time, but less often."""
        return 20 if self.steps >= 12_000 else 10 if self.steps >= 6_000 else 5

    @property
    def superposition(self) -> list[str]:
        """The flags of the TST run."""
        size, ratio = str(self.bag_size), str(self.step_ratio)
        return ["--tst-bag-size", size, "--tst-step-ratio", ratio]

    def batches(self, steps: int) -> int:
        """Batches of a run of some steps: those of training, and those of its evaluations."""
        run = replace(self, steps=steps)
        return steps + (run.evaluations + 1) * run.validation_batches

    def megatron_arguments(self, corpus: Path) -> list[str]:
        """Command line of an arm, without the superposition flags and the paths it writes."""
        text = f"""
            --hybrid-layer-pattern {"*-" * self.layers}
            --hidden-size {self.hidden} --ffn-hidden-size {self.ffn}
            --num-attention-heads {self.heads} --kv-channels {self.hidden // self.heads}
            --seq-length {self.length} --max-position-embeddings {self.length}
            --use-mcore-models --position-embedding-type rope --normalization RMSNorm --swiglu
            --disable-bias-linear --untie-embeddings-and-output-weights
            --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1
            --micro-batch-size {self.batch} --global-batch-size {self.batch}
            --train-iters {self.steps} --lr {self.learning_rate} --min-lr 0
            --lr-decay-style WSD --lr-wsd-decay-style linear
            --lr-warmup-iters {self.steps // 20} --lr-wsd-decay-iters {self.steps // 10}
            --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
            --seed {self.seed + 1} --split 98,2,0
            --eval-interval {max(self.steps // self.evaluations, 1)}
            --eval-iters {self.validation_batches}
            --eval-micro-batch-size {4 * self.batch} --eval-global-batch-size {4 * self.batch}
            --log-interval {max(self.steps // 200, 1)} --tensorboard-log-interval 10
            --save-interval {max(self.steps // 4, 1)} --tokenizer-type HuggingFaceTokenizer
        """
        paths = {"--tokenizer-model": f"{corpus}-tokenizer", "--data-path": str(corpus)}
        precision = ["--bf16"] if self.precision == "bf16" else []
        return text.split() + precision + [part for pair in paths.items() for part in pair]


SUBWORDS = Settings(vocabulary=2048)


@dataclass(frozen=True)
class TimeLimit:
    """When the command should have ended.

    Attributes:
        started: seconds of the monotonic clock.
        minutes: from there.
        may_shorten: whether runs that would take longer get fewer steps.
    """

    started: float
    minutes: float
    may_shorten: bool

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class _TooSlowError(Exception):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


def train_in_time(
    output: Path, settings: Settings, corpus: Path, limit: TimeLimit, console: Console
) -> tuple[list[Execution], Plan | None]:
    """Trains both arms for the same steps, as many as fit into the time.

    The first steps of the real runs tell how fast the machine is. If it is fast enough they go on;
    else both start anew with fewer steps.

    Returns:
        The arms, and what was expected of them; None if they ended before that was known.
    """
    arms = make_arms(output, settings, corpus)
    try:
        return arms, _train(arms, settings, limit, console)
    except _TooSlowError as found:
        settings = replace(settings, steps=found.plan.steps)
        arms = make_arms(output, settings, corpus)
        _train(arms, settings, None, console)
        return arms, found.plan


def make_arms(output: Path, settings: Settings, corpus: Path) -> list[Execution]:
    """The baseline and the TST run, in fresh folders."""
    arms = []
    for name, flags in (("baseline", []), ("tst", settings.superposition)):
        shutil.rmtree(output / name, ignore_errors=True)
        arguments = [*settings.megatron_arguments(corpus), *flags]
        arms.append(Execution(name, RunFolder(output / name), arguments, settings.steps))
    return arms


def _train(
    arms: list[Execution], settings: Settings, limit: TimeLimit | None, console: Console
) -> Plan | None:
    """Runs the arms side by side, or one after the other on a single core.

    Raises:
        _TooSlowError: they would take longer than the limit, and were ended.
    """
    slots = [Slot(cores=(core,)) for core in cores_of_this_process()[: len(arms)]] or [Slot()]
    launched = 0.0 if limit is None else limit.elapsed
    plan: Plan | None = None

    with TaskProgress(console) as display:

        def show(state: Progress) -> None:
            nonlocal plan
            for arm in arms:
                if state.states[arm.name] in ("failed", "diverged"):
                    _give_up(arm)
                if arm.started:
                    display.update(arm.name, arm.log.step, arm.total_steps, *_step_and_losses(arm))
            if limit is None or plan is not None:
                return
            pace = measure_pace(state.running, ceil(len(arms) / len(slots)), settings.batches)
            if pace is not None:
                plan = choose_steps(
                    settings.steps, pace, launched, limit.elapsed, limit.minutes, limit.may_shorten
                )
                display.say(plan.sentences())
                if plan.is_shortened:
                    raise _TooSlowError(plan)

        run_all(arms, slots, show)
    return plan


def _step_and_losses(arm: Execution) -> tuple[str, str]:
    loss, validation = (
        "-" if value is None else f"{value:.3f}" for value in (arm.log.loss, arm.log.validation)
    )
    step = f"step {arm.log.step:,} of {arm.total_steps:,}"
    return step, f"loss {loss}, validation loss {validation}"


def _give_up(arm: Execution) -> None:
    log = arm.folder.log
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    sys.exit(f"{tail}\n\nThe {arm.name} run failed: see {log}")
