"""What a plan has to be careful about."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tst.common.units import quantity
from megatron_tst.planning.advisor import Plan
from megatron_tst.planning.arms import Arm
from megatron_tst.planning.evidence import RATIOS, SHORT_RUNS
from megatron_tst.planning.published import published_runs
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.losses import is_hosts
from megatron_tst.settings.phases import bags_of

SHORTEST_PUBLISHED_STEPS = 20_000

# "Recovers within a few thousand steps."
_RECOVERY_STEPS = 5000
_LARGEST_PUBLISHED_TEXT_FACTOR = 4.75
# Up to this many, repeats are worth about as much as new text (Muennighoff et al., arXiv
# 2305.16264).
_HARMLESS_EPOCHS = 4


def warnings(plan: Plan) -> list[str]:
    """Sentences on what limits the plan or its estimates; none of which stops it."""
    return [
        *_about_text(plan),
        *_about_setting(plan),
        *_about_length(plan),
        *_about_published_runs(plan),
        *_about_losses(plan),
    ]


def _about_text(plan: Plan) -> Iterator[str]:
    request, arm = plan.request, plan.recommended
    if arm.epochs > 1:
        yield (
            f"The tokens are read {arm.epochs:.2f} times; published runs read new tokens only, and "
            "the loss counts repeats as new tokens."
        )
    if arm.epochs > _HARMLESS_EPOCHS:
        yield (
            f"Beyond {_HARMLESS_EPOCHS} epochs repeats are worth ever less than new tokens "
            "(arXiv 2305.16264)."
        )
    if plan.limit == "data-bound" and arm.gpu_hours < 0.99 * request.gpu_hours:
        yield (
            f"The tokens end before the budget: {request.gpu_hours - arm.gpu_hours:,.0f} GPU-hours "
            "are left over. Get more data, raise --max-epochs, or train a larger model."
        )
    tst, wanted = plan.tst, plan.with_ample_text
    if plan.limit == "compute-bound" and wanted.data_tokens > request.readable_tokens:
        yield (
            f"The tokens limit s and r: with {quantity(wanted.data_tokens)} tokens, "
            f"{describe(wanted)} would reach {wanted.loss.value:.3f} instead of "
            f"{tst.loss.value:.3f}."
        )


def _about_setting(plan: Plan) -> Iterator[str]:
    config, reference = plan.tst.schedule.config, plan.reference
    ratio = config.step_ratio or 0.0
    low, high = reference.bag_sizes
    if not 0.2 <= ratio <= 0.4:
        yield f"--tst-step-ratio {ratio:g} is outside of the published best, 0.2 to 0.4: {RATIOS}"
    if not low <= config.bag_size <= high:
        best = f"{low} to {high} is the best" if low < high else f"{low} was used"
        yield f"--tst-bag-size {config.bag_size}: {best} at {reference.size.name} as published."
    factor = plan.tst.data_tokens / plan.tst.equivalent_tokens
    if factor > _LARGEST_PUBLISHED_TEXT_FACTOR:
        yield (
            f"s * r is large: the run reads {factor:.1f} times the tokens of a baseline; the most "
            f"of a published final run is {_LARGEST_PUBLISHED_TEXT_FACTOR} times."
        )


def _about_length(plan: Plan) -> Iterator[str]:
    arm, size = plan.recommended, plan.request.size
    if arm.steps < SHORTEST_PUBLISHED_STEPS:
        yield (
            f"A short run: {arm.steps} steps, and the shortest published one has "
            f"{SHORTEST_PUBLISHED_STEPS}. {SHORT_RUNS}"
        )
    _, recovery = arm.phase_steps
    if arm.schedule.config.superposes_output and recovery < _RECOVERY_STEPS:
        yield (f"Phase 2 has {recovery} steps; recovering from the switch takes a few thousand.")
    each = arm.equivalent_tokens / size.visited_parameters
    fewest = min(run.tokens_a_parameter for run in published_runs())
    if each < fewest:
        yield (
            f"{each:.1f} equivalent tokens a parameter; the fewest of a published run are "
            f"{fewest:.1f}."
        )


def _about_published_runs(plan: Plan) -> Iterator[str]:
    request, reference = plan.request, plan.reference
    if not 0.5 <= request.batch_tokens / reference.batch_tokens <= 2:
        yield (
            f"A step has {quantity(request.batch_tokens)} tokens, those published for "
            f"{reference.size.name} {quantity(reference.batch_tokens)}: the loss does not know of "
            "the batch size."
        )
    if request.size != reference.size:
        yield (
            f"The learning rate is that of {reference.size.name}: tune it for {request.size.name}."
        )


def _about_losses(plan: Plan) -> Iterator[str]:
    losses = plan.request.losses
    if is_hosts(losses["plain"]):
        yield (
            f"--tst-loss-impl {plan.request.loss_impl}: phase 2 and baselines have Megatron's loss "
            f"and bags {losses['bags']}, which moves a fraction of the bytes: steps are not as "
            "long as each other, as hours and days take them to be, and their times compare "
            "kernels and not methods. Use auto."
        )


def describe(arm: Arm) -> str:
    """The setting of a run in a few words."""
    config = arm.schedule.config
    if not config.enabled:
        return "baseline"
    variant = SETTINGS["variant"].named(config.variant)
    sizes = ",".join(str(size) for size, _ in bags_of(arm.schedule.phases))
    if config.bag_sizes is not None:
        sizes = config.bag_sizes.replace(",", "|")
    return ", ".join(filter(None, (variant, f"s={sizes}", f"r={arm.step_ratio:.4g}")))
