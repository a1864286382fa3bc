"""Batch sizes at which Megatron would end a run are refused before it starts."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_tst.settings.batch_arguments import refuse_unusable_batch_sizes


def command(schedule: str | None, **changes: Any) -> Namespace:
    """Micro-batches of 2 on 2 ranks, thresholds in samples."""
    settings: dict[str, Any] = {
        "step_batch_size_schedule": schedule,
        "global_batch_size": 4,
        "seq_length": 1,
        "train_iters": None,
        "train_samples": 100,
        "micro_batch_size": 2,
        "data_parallel_size": 2,
        "gtp_weight_remat_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "microbatch_group_size_per_vp_stage": None,
    }
    return Namespace(**{**settings, **changes})


INTERLEAVED = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("args", "steps_done", "message"),
    [
        (command(None, global_batch_size=3), 0, None),
        (command("0:4 8:8"), 0, None),
        (command("0:4 8:10"), 0, "size 10 from step 2 on is not a multiple of 4, one micro-batch"),
        (command("0:2 8:8"), 0, "size 2 from step 0 on is not a multiple of 4"),
        # What lies behind may have had fewer ranks, and what lies beyond the end is never read.
        (command("0:2 8:8"), 4, None),
        (command("0:2 8:8"), 3, "size 2 from step 3 on is not a multiple of 4"),
        (command("0:4 100:10"), 0, None),
        (command("0:4 99:10"), 0, None),
        (
            command("0:8 16:4"),
            0,
            r"size 4 from step 2 on is smaller .* \(--exit-interval 2\)",
        ),
        (command("0:8 16:4"), 1, "size 4 from step 2 on is smaller than 8"),
        (command("0:8 16:4"), 2, None),
        (command("0:16 32:32", **INTERLEAVED), 0, None),
        (
            command("0:16 32:24", **INTERLEAVED),
            0,
            "makes 6 micro-batches, .* multiple of 16",
        ),
        (command("0:8 32:16", **INTERLEAVED), 0, "makes 2 micro-batches"),
        (command("0:40", **INTERLEAVED, microbatch_group_size_per_vp_stage=5), 0, None),
        (command("0:36", **INTERLEAVED, microbatch_group_size_per_vp_stage=5), 0, None),
        (command("0:32", **INTERLEAVED, microbatch_group_size_per_vp_stage=5), 0, "makes 8 micro"),
    ],
)
def test_batch_sizes_ahead(args: Namespace, steps_done: int, message: str | None) -> None:
    if message is None:
        refuse_unusable_batch_sizes(args, steps_done)
        return
    with pytest.raises(ValueError, match=message):
        refuse_unusable_batch_sizes(args, steps_done)
