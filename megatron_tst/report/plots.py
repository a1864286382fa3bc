"""Which plots a study gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from megatron_tst.report import wording
from megatron_tst.report.comparison import Study
from megatron_tst.report.curve_plots import draw_training, draw_validation
from megatron_tst.report.decomposition import gains_of
from megatron_tst.report.describing import in_last_phase
from megatron_tst.report.drawing import Canvas, Plot, render
from megatron_tst.report.families import Group
from megatron_tst.report.gain_plots import draw_gain_parts
from megatron_tst.report.gap_plots import (
    draw_gaps,
    draw_heat_map,
    draw_lengths,
    draw_offsets,
    draw_over_bag_sizes,
    draw_over_step_ratios,
)
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import ARMS, Pair
from megatron_tst.report.statistics import FEWEST_SEEDS
from megatron_tst.report.sweep import largest_sweep
from megatron_tst.settings.phases import plain_name

_DRAWN_SETTINGS = 3
_DRAWN_GROUPS = 6
_DRAWN_GAINS = 12


class _Sketch(NamedTuple):
    """What :func:`~megatron_tst.report.drawing.render` takes."""

    name: str
    title: str
    caption: str
    draw: Callable[[Canvas], None]
    height: float = 3.9


def render_plots(study: Study, prefix: str = "") -> list[Plot]:
    """Renders all plots of a study.

    Args:
        study: what to plot.
        prefix: of the plots' names, which tells studies on one page apart.
    """
    sketches = _sketches(study)
    return [render(*sketch._replace(name=f"{prefix}{sketch.name}")) for sketch in sketches]


def prefixes(studies: Sequence[Study]) -> list[str]:
    """What tells the plots of studies on one page apart."""
    return ["" if len(studies) == 1 else f"{i}-" for i in range(1, len(studies) + 1)]


def captions(studies: Sequence[Study]) -> dict[str, str]:
    """Captions of all plots on a page, by name; nothing is drawn."""
    return {
        f"{prefix}{sketch.name}": sketch.caption
        for prefix, study in zip(prefixes(studies), studies, strict=True)
        for sketch in _sketches(study)
    }


def _sketches(study: Study) -> list[_Sketch]:
    best = study.best
    return [] if best is None else [*_gaps(study, best), *_curves(study, best), *_offsets(best)]


def drawn_groups(study: Study, best: Matchup) -> list[Group]:
    """The groups whose curves are drawn: the best, its baseline, and others with large gaps."""
    drawn = [matchup.tst for matchup in study.ranked if matchup.baseline is best.baseline]
    groups = list(dict.fromkeys([best.baseline, best.tst, *drawn]))[: _DRAWN_SETTINGS + 1]
    diverged = [m.tst for m in study.matchups if m.tst.diverged and m.tst not in groups]
    return [*groups, *diverged][:_DRAWN_GROUPS]


def _curves(study: Study, best: Matchup) -> Iterator[_Sketch]:
    groups = drawn_groups(study, best)
    pair = best.pairs[0]
    counts = {n for group in groups if (n := len(group.counted)) >= FEWEST_SEEDS}
    band = f" Bands: 95% intervals (Student's t, {_n(counts)})." if counts else ""
    dotted = " Dotted with a cross: diverged." if any(group.diverged for group in groups) else ""
    diamonds = (
        " Diamonds mark where each arm first reached the other's final loss."
        if len(best.pairs) == 1 and _has_equal_loss(pair)
        else ""
    )
    validation = partial(draw_validation, groups=groups, matchup=best)
    yield _Sketch(
        "equal-flops",
        "Equal FLOPs",
        "Validation loss against equivalent tokens, to which FLOPs are proportional."
        f"{diamonds}{band}{dotted}",
        partial(validation, budget="equivalent tokens"),
    )
    if in_last_phase(pair.tst.phases, pair.tst.steps)[-1]:
        yield _Sketch(
            "end-of-run",
            "Equal FLOPs, end of the run",
            f"Validation loss over the second half of {plain_name(pair.tst.phases)}."
            f"{diamonds}{band}",
            partial(validation, budget="equivalent tokens", second_half=True),
        )
    yield _Sketch(
        "equal-data",
        "Equal data",
        f"Validation loss against data tokens.{band}",
        partial(validation, budget="data tokens"),
    )
    if best.times_are_comparable:
        yield _Sketch(
            "training-time",
            "Training time",
            f"Validation loss against seconds in training steps, without evaluation.{band}",
            partial(validation, budget="seconds"),
        )
    yield from _training_curves(groups, pair)


def _has_equal_loss(pair: Pair) -> bool:
    return any(pair.equal_loss("equivalent tokens", arm).speed_up for arm in ARMS)


def _training_curves(groups: list[Group], pair: Pair) -> Iterator[_Sketch]:
    if all(run.training_steps.size for run in (pair.baseline, pair.tst)):
        draw = partial(draw_training, groups=groups)
        yield _Sketch("training-loss", "Training loss", wording.jump_explanation(pair), draw)


def _offsets(best: Matchup) -> Iterator[_Sketch]:
    losses = best.pairs[0].tst.offset_losses
    if losses.size:
        yield _Sketch(
            "offset-loss",
            "Loss by position in the bag",
            f"Phase {len(best.pairs[0].tst.phases) - 1} of {best.tst.label}: training loss of the "
            "i-th token of the predicted bag.",
            partial(draw_offsets, losses=losses),
        )


def _gaps(study: Study, best: Matchup) -> Iterator[_Sketch]:
    if study.ranked and (len(study.ranked) > 1 or len(best.pairs) > 1):
        yield _Sketch(
            "gaps",
            "Gap to the baseline at equal FLOPs",
            "Final loss of the baseline minus that of TST, paired by seed: mean, 95% interval "
            f"(Student's t, {_pairs(study.ranked)}; beyond the frame where it is far wider than "
            "the seeds), each seed a stroke. Filled: finished, and the interval of at least three "
            "seeds leaves out zero.",
            partial(draw_gaps, matchups=study.ranked),
            height=1.2 + 0.32 * len(study.ranked),
        )
    yield from _parts(study)
    yield from _sweep(study)
    with_lengths = [m for m in study.ranked if m.speed_up_off_ends() is not None]
    if with_lengths:
        first = best if best in with_lengths else with_lengths[0]
        others = [m for m in with_lengths if m.baselines == first.baselines and m is not first]
        yield _Sketch(
            "equal-loss",
            "Equal loss, from finished runs",
            f"{wording.off_ends(first)} A line for each of {len(first.pairs_with_lengths)} seeds; "
            "every mark is one finished run.",
            partial(draw_lengths, matchup=first, others=others[: _DRAWN_SETTINGS - 1]),
        )


def _parts(study: Study) -> Iterator[_Sketch]:
    found = [gain for gain in gains_of(study) if gain.pairs]
    if gains := [gain for gain in found if gain.total.mean > 0][:_DRAWN_GAINS]:
        yield _Sketch(
            "gain-parts",
            "The decay and the bags",
            "What TST gains on a baseline planned for more steps, read at the last step of TST: "
            "the part that a finished baseline of the length of TST has too, and the part of the "
            f"bags, with its 95% interval (Student's t, {_n({len(one.pairs) for one in gains})}). "
            f"{len(gains)} of {len(found)} settings, best first.",
            partial(draw_gain_parts, gains=gains),
            height=1.4 + 0.32 * len(gains),
        )


def _sweep(study: Study) -> Iterator[_Sketch]:
    sweep = largest_sweep(study.matchups)
    if sweep is None:
        return
    if len(sweep.bag_sizes) > 1 and len(sweep.step_ratios) > 1:
        yield _Sketch(
            "heat-map",
            "Gap over bag size and step ratio",
            f"Nats a token, with half of the 95% interval (Student's t, "
            f"{_pairs(list(sweep.cells.values()))}). A heavy frame: finished, and the interval of "
            "at least three seeds leaves out zero. Hatched: no run.",
            partial(draw_heat_map, sweep=sweep),
            height=1.2 + 0.62 * len(sweep.step_ratios),
        )
    for lines, name, title, draw in (
        (sweep.over_bag_sizes(), "over-bag-size", "bag size", draw_over_bag_sizes),
        (sweep.over_step_ratios(), "over-step-ratio", "step ratio", draw_over_step_ratios),
    ):
        if lines:
            yield _Sketch(
                name,
                f"Gap over {title}",
                "The U-curve of the loss, upside down: the gap to the baseline, with 95% intervals "
                f"(Student's t, {_pairs([one for line in lines.values() for one in line])}; some "
                "reach beyond the frame). A hollow mark: before the end of its runs.",
                partial(draw, sweep=sweep),
            )


def _pairs(matchups: Sequence[Matchup]) -> str:
    return _n({len(matchup.pairs) for matchup in matchups if matchup.pairs})


def _n(counts: Collection[int]) -> str:
    """How many seeds settings have, and which have no interval for want of a second one."""
    low, high = min(counts), max(counts)
    found = f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"{found}, none for one seed" if low == 1 else found
