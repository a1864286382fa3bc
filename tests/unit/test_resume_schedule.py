"""A resume at another learning rate schedule is refused before anything is built."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_arguments import batch_sizes_from_args
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.resume_batches import refuse_other_past
from megatron_tst.training.resume_schedule import refuse_other_learning_rate

STEPS_DONE = 5


def command(batch_size: int, decreases: bool, **changes: Any) -> Namespace:
    """Micro-batches of 2 on 4 ranks, 100 steps of them, the last 20 of which decay."""
    settings: dict[str, Any] = {
        "load": "checkpoints",
        "no_load_optim": False,
        "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False,
        "global_batch_size": batch_size,
        "decrease_batch_size_if_needed": decreases,
        "step_batch_size_schedule": None,
        "micro_batch_size": 2,
        "data_parallel_size": 4,
        "gtp_weight_remat_size": 1,
        "consumed_train_samples": STEPS_DONE * 8,
        "train_iters": 100,
        "train_samples": None,
        "lr": 1e-3,
        "lr_decay_iters": None,
        "lr_decay_style": "WSD",
        "lr_warmup_iters": 10,
        "lr_warmup_fraction": None,
        "lr_wsd_decay_iters": 20,
    }
    return Namespace(**{**settings, **changes})


def refusal(saved: Namespace, args: Namespace) -> str | None:
    sizes = batch_sizes_from_args(args)
    schedule = SuperpositionSchedule(SuperpositionConfig(bag_size=4, steps=10), 100, sizes, 16)
    try:
        refuse_other_past(args, schedule, saved, STEPS_DONE)
        refuse_other_learning_rate(args, schedule, saved)
    except UsageError as error:
        return str(error)
    return None


USES_CHECKPOINT = {"use_checkpoint_opt_param_scheduler": True}


@pytest.mark.parametrize(
    ("saved", "args", "expected"),
    [
        (command(10, True), command(10, True), None),
        (command(8, False), command(8, True), None),
        (
            command(10, True),
            command(8, False),
            "--load checkpoints was trained with the equivalent of --global-batch-size 10 "
            "--train-samples 1000 --lr-decay-samples 1000 --lr-warmup-samples 100 "
            "--lr-wsd-decay-samples 200, and this command has --global-batch-size 8 "
            "--train-samples 800 --lr-decay-samples 800 --lr-warmup-samples 80 "
            "--lr-wsd-decay-samples 160, which changes the learning rate, the weight decay or "
            "their schedule: pass --global-batch-size 10 --decrease-batch-size-if-needed, or "
            "--override-opt_param-scheduler to go on with the values of this command.",
        ),
        (command(8, False), command(11, True), "pass --global-batch-size 8, or --override"),
        (
            command(10, True),
            command(11, True, lr=2e-3, lr_warmup_iters=20),
            "pass --global-batch-size 10 --decrease-batch-size-if-needed --lr-warmup-iters 10 "
            "--lr 0.001, or --override",
        ),
        (
            command(10, True),
            command(8, False, **USES_CHECKPOINT),
            "--lr-wsd-decay-samples 160, which changes the learning rate, the weight decay or "
            "their schedule: pass --global-batch-size 10 --decrease-batch-size-if-needed, which "
            "--use-checkpoint-opt_param-scheduler does not take from the checkpoint.",
        ),
        # All that differs comes from the checkpoint, in samples.
        (
            command(10, True, lr_wsd_decay_iters=None, lr_decay_style="cosine"),
            command(8, False, lr_wsd_decay_iters=None, lr_decay_style="cosine", **USES_CHECKPOINT),
            None,
        ),
        (command(10, True), command(8, False, override_opt_param_scheduler=True), None),
        # Other steps that are as many samples asked for.
        (
            command(10, True, lr_warmup_iters=8),
            command(8, False, train_iters=125, lr_warmup_iters=10, lr_wsd_decay_iters=25),
            None,
        ),
    ],
)
def test_a_batch_size_asked_for_that_ranks_make_smaller(
    saved: Namespace, args: Namespace, expected: str | None
) -> None:
    """Each step reads 8 samples, and the schedule counts as many as are asked for."""
    message = refusal(saved, args)
    assert message == expected or (expected and expected in (message or ""))
