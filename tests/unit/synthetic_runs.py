"""Runs with curves that are formulas, for tests of the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_tst.report.results import RunResult

TOKENS_PER_STEP = 16


def line(end: float, total_steps: int = 100) -> Callable[[float], float]:
    """A straight line down to ``end`` at the last step."""
    return lambda step: end + 0.01 * (total_steps - step)


def synthetic_run(
    loss: Callable[[float], float],
    *,
    bag_size: int = 1,
    step_ratio: float = 0.25,
    total_steps: int = 100,
    seed: int = 0,
    every: int = 10,
    seconds_per_step: float = 0.5,
    name: str | None = None,
    status: Any = "finished",
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> RunResult:
    """A run whose validation loss is a formula of the step; its training loss is one higher,
    and two higher still in phase 1."""
    switch = round(step_ratio * total_steps) if bag_size > 1 else 0
    steps = np.arange(every, total_steps + 1, every)
    training_steps = np.arange(1, total_steps + 1)
    superposition: dict[str, Any] = {"bag_size": bag_size}
    if bag_size > 1:
        superposition |= {"step_ratio": step_ratio, "switch_step": switch, "variant": "full"}
    label = f"s{bag_size}-r{step_ratio}" if bag_size > 1 else "baseline"
    extra = "".join(f"-{key}{value}" for key, value in settings.items())
    return RunResult(
        name=name or f"{label}-{total_steps}{extra}-seed{seed}",
        status=status,
        settings={
            "parameters": 1000,
            "hidden_size": 8,
            **superposition,
            "learning_rate": 1e-3,
            "total_steps": total_steps,
            "lr_warmup_iters": total_steps // 20,
            "seed": seed,
            **settings,
        },
        data={"data_path": "corpus", "split": "98,2,0"} if data is None else data,
        machine="test",
        commit="abc",
        steps=steps,
        validation_loss=np.array([loss(float(step)) for step in steps], dtype=np.float64),
        equivalent_tokens=steps * TOKENS_PER_STEP,
        data_tokens=(steps + np.minimum(steps, switch) * (bag_size - 1)) * TOKENS_PER_STEP,
        seconds=np.asarray(steps * seconds_per_step, dtype=np.float64),
        training_steps=training_steps,
        training_loss=np.array(
            [loss(float(step)) + (3.0 if step <= switch else 1.0) for step in training_steps]
        ),
    )
