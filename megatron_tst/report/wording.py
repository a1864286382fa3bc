"""Turns the numbers of a comparison into sentences, none of which is written by hand."""

from __future__ import annotations

from math import exp

from megatron_tst.report.comparison import (
    ARMS,
    Arm,
    Comparison,
    EqualBudget,
    EqualLoss,
    unexpected_differences,
)
from megatron_tst.report.runs import Budget

ARM_NAMES: dict[Arm, str] = {"baseline": "the baseline", "TST": "TST"}
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NOT_REACHED = "not reached within the run"
# Losses are quoted to three decimals; a smaller gap is no gap.
_DRAW = 5e-4


def quantity(value: float) -> str:
    """A count with three significant digits: 42 B, 1.05 T."""
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        # 999.6 k would otherwise be rounded to 1e+03 k.
        if value >= factor * 0.9995:
            return f"{value / factor:#.3g}".rstrip(".") + suffix
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def amount(budget: Budget, value: float) -> str:
    """An amount spent, with its unit."""
    return duration(value) if budget == "seconds" else f"{quantity(value)} {budget}"


def signed(value: float) -> str:
    """A gap in nats with its sign."""
    return f"{value:+.3f}".replace("-", MINUS)


def cost(reading: EqualLoss, arm: Arm) -> str:
    """What an arm spent to reach the target."""
    spent = reading.cost_of(arm)
    return NOT_REACHED if spent is None else amount(reading.budget, spent)


def verdict(comparison: Comparison) -> list[str]:
    """Who won at equal FLOPs, at equal loss, at equal data and at equal time: a sentence each."""
    sentences = [
        _outcome("At equal FLOPs", comparison.equal_flops),
        _speed_sentence(comparison),
        _outcome("At equal data", comparison.equal_data),
        _outcome("At equal training time", comparison.equal_time),
    ]
    return [sentence for sentence in sentences if sentence]


def _outcome(condition: str, reading: EqualBudget) -> str:
    condition = f"{condition} ({amount(reading.budget, reading.amount)})"
    if reading.gap is None:
        return f"{condition} the arms cannot be compared: one was first evaluated later."
    if abs(reading.gap) < _DRAW:
        return f"{condition} the arms drew: validation loss {reading.tst_loss:.3f} in both."
    word = "won" if reading.gap > 0 else "lost"
    phase = ", while still in phase 1" if reading.tst_in_superposition else ""
    return (
        f"{condition} TST {word}{phase}: validation loss {reading.tst_loss:.3f} against "
        f"{reading.baseline_loss:.3f}, a gap of {signed(reading.gap)} nats "
        f"({perplexity_change(reading.gap)} perplexity)."
    )


def perplexity_change(gap: float) -> str:
    """What a gap in nats (positive where TST is ahead) does to the perplexity."""
    ratio = exp(-gap)
    if ratio > 2:
        return f"{ratio:.3g}{TIMES} the"
    return f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'}"


def _speed_sentence(comparison: Comparison) -> str:
    """How much sooner the arm with the lower final loss reached the final loss of the other."""
    tst_ahead = comparison.tst.final_loss <= comparison.baseline.final_loss
    winner, loser = ARMS if not tst_ahead else reversed(ARMS)
    flops = comparison.equal_loss_for(loser, "equivalent tokens")
    flops_ratio, time_ratio = (
        reading.speed_up if tst_ahead or reading.speed_up is None else 1 / reading.speed_up
        for reading in (flops, comparison.equal_loss_for(loser, "seconds"))
    )
    if flops_ratio is None or time_ratio is None:
        return ""
    return (
        f"To reach the final loss of {ARM_NAMES[loser]} ({flops.target_loss:.3f}), "
        f"{ARM_NAMES[winner]} needed {cost(flops, winner)} and {ARM_NAMES[loser]} "
        f"{cost(flops, loser)}: {ARM_NAMES[winner]} was {flops_ratio:.2f}{TIMES} as fast by FLOPs "
        f"and {time_ratio:.2f}{TIMES} as fast by training time."
    )


def cautions(comparison: Comparison) -> list[str]:
    """What a reader must know before trusting the verdict."""
    found = ["One seed; no interval: a second seed may move the gap."]
    for name, run in (("baseline", comparison.baseline), ("TST", comparison.tst)):
        if run.last_step < run.schedule.total_steps:
            found.append(
                f"The {name} run was last evaluated at step {run.last_step} of "
                f"{run.schedule.total_steps}: its learning rate had not finished its decay."
            )
    if comparison.tst.ended_in_superposition:
        found.append(
            "The TST run was stopped in phase 1: it is not an ordinary language model yet, and the "
            "verdict is not one about the method."
        )
    different = unexpected_differences(comparison)
    if different:
        found.append(
            f"The arms differ in more than superposition: {', '.join(different)}. "
            "The gap cannot be put down to superposition alone."
        )
    if comparison.baseline.info["commit"] != comparison.tst.info["commit"]:
        found.append("The arms were trained with different commits.")
    if comparison.baseline.info["machine"] != comparison.tst.info["machine"]:
        found.append("The arms were trained on different machines: times cannot be compared.")
    return found


def jump_explanation(comparison: Comparison) -> str:
    """Why the training loss of a TST run is discontinuous."""
    config = comparison.tst.schedule.config
    s = config.bag_size
    if config.superposes_output:
        seen = f"in phase 1 it scores {s} tokens at once"
    else:
        seen = f"in phase 1 it predicts the first token of a bag from bags of {s}"
    return (
        f"The training loss of TST jumps at step {comparison.tst.schedule.switch_step} because it "
        f"is another quantity before: {seen}, afterwards the next token. "
        "The validation loss is the next-token loss throughout."
    )
