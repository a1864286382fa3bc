"""Turns the numbers of a comparison into sentences, none of which is written by hand."""

from __future__ import annotations

from megatron_tst.common.units import TIMES
from megatron_tst.report.common_step import last_common_step, loss_of, unread
from megatron_tst.report.comparison import Study
from megatron_tst.report.decomposition import gains_of
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import Arm, EqualLoss, Pair
from megatron_tst.report.recovery import recovery_of
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import FEWEST_SEEDS, Estimate, estimate
from megatron_tst.report.tuning import tuned_arms
from megatron_tst.report.units import amount, gap_text, perplexity_change, ratio_text, seeds, signed
from megatron_tst.settings.phases import bags_name

NOT_REACHED = "not reached within the run"
TOO_FEW = "too few seeds"
UNFINISHED = "unfinished"
# Losses are quoted to three decimals; a smaller gap is no gap.
_DRAW = 5e-4


def outcome(gap: Estimate) -> str:
    """What a gap says about TST: won, lost, drew, undecided, or that it has too few seeds.

    The interval decides, of at least :data:`FEWEST_SEEDS` seeds.
    """
    if gap.n < FEWEST_SEEDS:
        return TOO_FEW
    if not gap.excludes(0.0):
        return "undecided"
    if abs(gap.mean) < _DRAW:
        return "drew"
    return "won" if gap.mean > 0 else "lost"


def result_of(matchup: Matchup, gap: Estimate) -> str:
    """The outcome of a matchup whose gap is known; one before the end of its runs is none."""
    return outcome(gap) if matchup.is_finished else UNFINISHED


def verdict(study: Study) -> list[str]:
    """The outcome of a study, a sentence each; about its best setting."""
    best = study.best
    if best is None:
        return ["No TST run can be set against a baseline."]
    sentences = [
        _equal_budget(best, "At equal FLOPs", "equivalent tokens"),
        _at_common_step(best),
        _tuned(study, best),
        *speed_sentences(best),
        *_equal_data(best),
        parts_of_gain(study),
        _equal_budget(best, "At equal training time", "seconds")
        if best.times_are_comparable
        else "",
        switch_sentence(best),
    ]
    if len(study.ranked) > 1:
        sentences.insert(0, _ranking(study, best))
    return [sentence for sentence in sentences if sentence]


def _ranking(study: Study, best: Matchup) -> str:
    ranked, chosen = study.ranked, study.picked_from
    outcomes = [result_of(matchup, matchup.gap) for matchup in ranked if matchup.gap]
    counts = ", ".join(
        f"{outcomes.count(word)} {'with ' * (word == TOO_FEW)}{word}"
        for word in ("won", "lost", "drew", "undecided", TOO_FEW, UNFINISHED)
        if word in outcomes
    )
    fewer = any(len(matchup.pairs) < len(best.pairs) for matchup in chosen)
    limits = ["that are finished"] * (len(chosen) < len(ranked)) + ["with the most seeds"] * fewer
    among = f", of those {' and '.join(limits)}," if limits else ""
    largest = f"The largest gap to the best baseline of its length{among}"
    if not study.has_best_baseline(best):
        largest = f"None is against the best baseline of its length. The largest gap{among}"
    return (
        f"{len(ranked)} TST settings at equal FLOPs: {counts}. {largest} is that of "
        f"{best.tst.label}; the sentences below are about it."
    )


def _equal_budget(matchup: Matchup, condition: str, budget: Budget) -> str:
    readings = [pair.equal_budget(budget) for pair in matchup.pairs]
    gap = matchup.mean_of(lambda pair: pair.equal_budget(budget).gap)
    spent = sum(reading.amount for reading in readings) / len(readings)
    condition = f"{condition} ({amount(budget, spent)})"
    if gap is None:
        return f"{condition} the arms cannot be compared: one was not evaluated near it."
    phase = ""
    if any(reading.tst_in_superposition for reading in readings):
        phase = f", while still in {bags_name(matchup.pairs[0].tst.phases)}"
    losses = [
        sum(loss for loss in losses if loss is not None) / len(readings)
        for losses in (
            [reading.tst_loss for reading in readings],
            [reading.baseline_loss for reading in readings],
        )
    ]
    return f"{condition} {_claim(gap, phase, matchup.is_finished)}: {_losses(losses, gap)}"


def _at_common_step(matchup: Matchup) -> str:
    """What was not evaluated where, and what can be read before; empty if nothing is lacking."""
    lacking = unread(matchup)
    if not lacking:
        return ""
    named = ", ".join(f"{run.name} was not evaluated near step {step}" for run, step in lacking)
    step = last_common_step(matchup)
    if step is None:
        return f"{named}, and there is no step at which both arms were: evaluate them at the same."
    arms = [[loss_of(run, step) for run in (pair.tst, pair.baseline)] for pair in matchup.pairs]
    gap = estimate([baseline - tst for tst, baseline in arms])
    is_superposed = any(step <= pair.tst.switch_step for pair in matchup.pairs)
    phase = f", while still in {bags_name(matchup.pairs[0].tst.phases)}" * is_superposed
    losses = [sum(column) / len(arms) for column in zip(*arms, strict=True)]
    claim = _claim(gap, phase, matchup.is_finished)
    return (
        f"{named}. At step {step}, the last at which both arms were, {claim}: "
        f"{_losses(losses, gap)}"
    )


def _claim(gap: Estimate, phase: str = "", is_finished: bool = True) -> str:
    """What a gap says; one before the end of its runs wins and loses nothing."""
    result = outcome(gap)
    if gap.n == 1:
        return f"{_side(gap)} in this one run{phase}"
    if result == TOO_FEW:
        return f"{seeds(gap.n)} are too few to say whether TST gains{phase}"
    if result == "undecided":
        return f"it is undecided whether TST gains{phase}"
    if not is_finished:
        return f"{_side(gap)} where runs were stopped{phase}"
    return f"the arms drew{phase}" if result == "drew" else f"TST {result}{phase}"


def _side(gap: Estimate) -> str:
    """Which arm one run has ahead; it may be chance."""
    if abs(gap.mean) < _DRAW:
        return "the arms drew"
    return f"TST is {'ahead' if gap.mean > 0 else 'behind'}"


def _tuned(study: Study, best: Matchup) -> str:
    """Each arm at its own best settings of the optimizer; empty where the best setting is that."""
    found = tuned_arms(study, best)
    if found is None:
        return ""
    return (
        f"Each arm at the best learning rate, or other setting of the optimizer, that it was "
        f"trained with, {found.tst.label} against {found.baseline.label}, {_claim(found.gap)}: a "
        f"gap of {signed(found.gap.mean)} nats{_over_seeds(found.gap)}."
    )


def _losses(losses: list[float], gap: Estimate) -> str:
    text = (
        f"validation loss {losses[0]:.3f} against {losses[1]:.3f}, a gap of {signed(gap.mean)} "
        f"nats ({perplexity_change(gap.mean)} perplexity)"
    )
    return f"{text}{_over_seeds(gap)}."


def _over_seeds(gap: Estimate) -> str:
    if gap.low is None or gap.high is None:
        return ""
    zero = "" if gap.excludes(0.0) else ", which holds zero"
    return f"; 95% interval over {seeds(gap.n)} {signed(gap.low)} to {signed(gap.high)}{zero}"


def speed_sentences(matchup: Matchup) -> list[str]:
    """The speed-up, read off one curve and off finished runs of several lengths."""
    return [sentence for sentence in (_off_curve(matchup), off_ends(matchup)) if sentence]


def _off_curve(matchup: Matchup) -> str:
    flops = matchup.speed_up_off_curve("equivalent tokens")
    if flops is None:
        return ""
    time = matchup.speed_up_off_curve("seconds") if matchup.times_are_comparable else None
    by_time = "" if time is None else f" and {ratio_text(time)} by training time"
    return (
        "Read from one curve, to the final loss of the arm that ended higher, TST was "
        f"{ratio_text(flops)} as fast as the baseline by FLOPs{by_time}; the arm that ended lower "
        "is read before its learning rate has decayed."
    )


def off_ends(matchup: Matchup) -> str:
    """The speed-up off finished baselines; empty if there is one length only."""
    found = matchup.speed_up_off_ends()
    if found is None:
        return ""
    start = f"Read from finished runs of {found.lengths} lengths, "
    if found.estimate is not None:
        return (
            f"{start}a baseline must train {ratio_text(found.estimate)} as many steps to end at "
            "the final loss of TST."
        )
    bounds = []
    if found.beyond:
        bounds.append(f"more than {found.longest:.3g}{TIMES} as many steps in {found.beyond}")
    if found.below:
        bounds.append(f"fewer than {found.shortest:.3g}{TIMES} as many in {found.below}")
    return (
        f"{start}a baseline must train {' and '.join(bounds)} of {seeds(found.seeds)} to end at "
        "the final loss of TST."
    )


def _equal_data(matchup: Matchup) -> list[str]:
    curve = _equal_budget(matchup, "At equal data", "data tokens")
    finished = matchup.equal_data_off_ends()
    if finished is None:
        return [curve]
    return [
        f"Against a finished baseline that read as many tokens, {_claim(finished)}: "
        f"a gap of {signed(finished.mean)} nats{_over_seeds(finished)}."
    ]


def parts_of_gain(study: Study) -> str:
    """How much of a gain on a longer baseline is the decay, of the first setting that has one."""
    gains = gains_of(study)
    if not gains:
        return ""
    gain = next((gain for gain in gains if gain.pairs), gains[0])
    start = (
        f"On the baseline planned for {gain.longer.total_steps} steps, read at step "
        f"{gain.tst.total_steps}"
    )
    if gain.not_separable:
        return f"{start}, the gain of {gain.tst.label} is not separable: {gain.not_separable}."
    share = "" if gain.decay_share is None else f" ({gain.decay_share:.0%})"
    return (
        f"{start} before its decay, the gain of {gain.tst.label} is {gap_text(gain.total)} nats: "
        f"{gap_text(gain.decay)}{share} are the decay, which "
        f"a finished baseline of the same length has too, and {gap_text(gain.bags)} the bags."
    )


def switch_sentence(matchup: Matchup) -> str:
    """The jump at the switch and how long it lasts; empty if it was not logged."""
    jump = matchup.mean_of(lambda pair: pair.switch().jump)
    found = recovery_of(matchup)
    first = ""
    if jump is not None:
        moved = "jumped" if jump.mean > 0 else "moved"
        first = f"At the switch the training loss {moved} by {gap_text(jump)} nats. "
    if not found.seeds:
        return (
            f"{first}When the validation loss came under the baseline's cannot be said: no step "
            "after the switch is one at which both arms were evaluated."
        )
    if not found.recovered:
        return (
            f"{first}After the switch the validation loss did not come under the baseline's to "
            "stay."
        )
    some = ""
    if found.recovered < found.pairs:
        some = f" in {found.recovered} of {found.seeds} seeds"
    start = f"{first}The validation loss came under the baseline's of the same step to stay"
    if found.steps is None:
        return (
            f"{start} between {found.earliest:.0f} and {found.latest:.0f} steps after the switch"
            f"{some}: it was evaluated too seldom to tell more."
        )
    share = found.steps / matchup.tst.total_steps
    return f"{start} {found.steps:.0f} steps after the switch ({share:.0%} of the run){some}."


def cost(reading: EqualLoss, arm: Arm) -> str:
    """What an arm spent to reach the target; within which, where it was evaluated too seldom."""
    reached = reading.reached_by(arm)
    if reached is None:
        return NOT_REACHED
    if reached.at is None:
        return f"{amount(reading.budget, reached.low)} to {amount(reading.budget, reached.high)}"
    return amount(reading.budget, reached.at)


def jump_explanation(pair: Pair) -> str:
    """Why the training loss of a TST run is discontinuous."""
    phases = pair.tst.phases
    sizes = " and then ".join(str(phase.bag_size) for phase in phases[:-1])
    if drawn := pair.tst.settings.get("bag_sizes"):
        sizes = " or ".join(part.partition(":")[0] for part in str(drawn).split(","))
    if phases[0].predicts_bags:
        seen = f"it scores {sizes} tokens at once"
    else:
        seen = f"it predicts the first token of a bag from bags of {sizes}"
    return (
        f"The training loss of TST jumps at step {pair.tst.switch_step} because it is another "
        f"loss before: in {bags_name(phases)} {seen}, afterwards the next token. "
        "The validation loss is the next-token loss throughout."
    )
