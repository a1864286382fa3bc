"""The forward step of both phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, unwrap_model
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch import Tensor

from megatron_tst.common.errors import UsageError
from megatron_tst.data.batch import get_batch, packed_documents
from megatron_tst.model.model import SuperpositionModel
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.ops.targets import IGNORE_INDEX
from megatron_tst.settings.phases import Phase
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.metrics import StepClock
from megatron_tst.training.step_hook import calls_back

_SPIKY_LOSS_FACTOR = 10

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
_straggler_detector = StragglerDetector()


class ForwardStep:
    """Runs the model on the next micro-batch; called by Megatron's schedules.

    Args:
        schedule: phases of the run.
        clock: measures the time spent in training steps.
        offset_loss_meter: collects the loss by offset in the bag on the steps that are logged.
    """

    def __init__(
        self,
        schedule: SuperpositionSchedule,
        clock: StepClock,
        offset_loss_meter: OffsetLossMeter,
    ) -> None:
        self.schedule = schedule
        self.clock = clock
        self.offset_loss_meter = offset_loss_meter

    def __call__(
        self,
        data_iterator: Iterator[dict[str, Tensor]],
        model: LanguageModule,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, LossFunction]:
        """Runs the model, or plans to.

        Args:
            data_iterator: yields collated samples; None on ranks that have no data loader.
            model: a model chunk of this rank.
            return_schedule_plan: plan the passes instead, for Megatron's schedule that overlaps the
                communication of the experts of one micro-batch with the computation of another.

        Returns:
            The per-position losses [b, l], or the plan, and the function that sums the losses up.
        """
        args, timers = get_args(), get_timers()
        is_training = torch.is_grad_enabled()
        # After the first step the clock is started between steps: a late pipeline stage gets here
        # only when its first input has arrived.
        if is_training:
            self._refuse_a_reset_that_nobody_does()
            self.clock.start()
        else:
            self.clock.stop()
        # The sample count, as in the dataset: what a batch holds depends on nothing else.
        phase = None
        if is_training:
            phase = self.schedule.phase_of_sample(args.consumed_train_samples)

        timers("batch-generator", log_level=2).start()
        with _straggler_detector(bdata=True):
            vp_stage = get_attr_wrapped_model(model, "vp_stage")
            batch = get_batch(data_iterator, args, phase, vp_stage)
            documents = packed_documents(batch, args)
            if documents is not None:
                # Counts the FLOPs of attention.
                update_seqlen_stats_from_cu_seqlens(documents.cu_seqlens_q)
        timers("batch-generator").stop()

        self._choose_meter(model, args, phase)
        # A plan runs when the batch of another may have come.
        _expect_gradient(model, None if return_schedule_plan else batch["loss_mask"])
        labels, sums_up = batch["labels"], args.tst_loss_impl == "linear"
        if sums_up:
            labels = _without_masked(labels, batch["loss_mask"])
            cast(SuperpositionModel, unwrap_model(model)).sums_up_losses = True
        with _straggler_detector:
            run = model.build_schedule_plan if return_schedule_plan else model
            losses = run(
                batch["tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=labels,
                loss_mask=batch["loss_mask"],
                packed_seq_params=documents,
            )
        return losses, partial(masked_mean_loss, batch["loss_mask"], is_masked=sums_up)

    def _refuse_a_reset_that_nobody_does(self) -> None:
        reset = self.schedule.config.reset_at_switch
        if self.schedule.config.enabled and reset != "none" and not calls_back():
            raise UsageError(
                f"--tst-reset-at-switch is {reset}, and this script does nothing at the switch: "
                "call run_after_each_step of megatron_tst.training.step_hook with a function that "
                "calls switch_phase, or use none."
            )

    def _choose_meter(self, model: LanguageModule, args: Any, phase: Phase | None) -> None:
        """Lets the model measure the loss by offset on logged steps only: it costs a pass."""
        inner = unwrap_model(model)
        if isinstance(inner, SuperpositionModel):
            has_bags = phase is not None and phase.is_superposed
            is_logged = has_bags and (args.curr_iteration + 1) % args.log_interval == 0
            inner.offset_loss_meter = self.offset_loss_meter if is_logged else None


def _expect_gradient(model: LanguageModule, loss_mask: Tensor | None) -> None:
    """Lets the loss of a micro-batch know the gradient that its backward will bring."""
    inner = unwrap_model(model)
    if isinstance(inner, SuperpositionModel):
        inner.expected_gradient = None
        # The losses of further tokens have scales of their own.
        if loss_mask is None or not torch.is_grad_enabled() or inner.config.mtp_num_layers:
            return
        gradient = gradient_of_losses(loss_mask, inner.config, get_num_microbatches())
        inner.expected_gradient = gradient


def gradient_of_losses(
    loss_mask: Tensor, config: TransformerConfig, num_microbatches: int
) -> Tensor:
    """What Megatron's backward brings as the gradient of each loss that counts, [1], float32.

    By the divisions of ``forward_step_calc_loss`` in
    ``megatron/core/pipeline_parallel/schedules.py``, the last first, as autograd goes through them.

    Args:
        loss_mask: [b, l], as for :func:`masked_mean_loss`.
        config: of the model.
        num_microbatches: of a step.
    """
    gradient = torch.ones(1, device=loss_mask.device)
    if config.grad_scale_func is not None:
        gradient = config.grad_scale_func(gradient)
    if config.calculate_per_token_loss:
        return gradient
    positions = loss_mask.float().sum().to(torch.int)
    return gradient / num_microbatches / positions.clamp(min=1)


def _without_masked(labels: Tensor | None, loss_mask: Tensor | None) -> Tensor | None:
    """Labels [b, l] or [b, l, s] of which those that do not count are ``IGNORE_INDEX``."""
    if labels is None or loss_mask is None:
        return labels
    is_masked = loss_mask == 0
    return labels.masked_fill(
        is_masked if labels.dim() == 2 else is_masked[..., None], IGNORE_INDEX
    )


def masked_mean_loss(
    loss_mask: Tensor | None, losses: Tensor, is_masked: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums the losses of a micro-batch and counts its positions; Megatron divides one by the other.

    Args:
        loss_mask: [b, l], 0 where a position does not count.
        losses: [b, l], float32.
        is_masked: they are 0 already where a position does not count, as labels can make them. Not
            multiplied by a mask, all have one gradient, which the linear loss sees.

    Returns:
        The sum, the number of latent positions that count, and both under the name that upstream
        logs. The unit of the count is the latent position in both phases.
    """
    assert loss_mask is not None, "called on a pipeline stage that has no targets"
    mask = loss_mask.view(-1).float()
    losses = losses.view(-1).float()
    loss = torch.sum(losses if is_masked else losses * mask)
    positions = mask.sum().clone().detach().to(torch.int)
    _check_loss(loss)
    report = torch.cat([loss.clone().detach().view(1), positions.view(1)])
    return loss, positions, {"lm loss": report}


def _is_rejected(rejects: Callable[[Tensor], Tensor], is_finite: bool, loss: Tensor) -> bool:
    return not is_finite and bool(rejects(loss))


def _check_loss(loss: Tensor) -> None:
    args = get_args()
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        # The host's two checks wait for the GPU once each; a finite loss passes both.
        is_finite = bool(torch.isfinite(loss))
        for rejects, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=partial(_is_rejected, rejects, is_finite),
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
