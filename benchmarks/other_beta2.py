"""Trains on from a checkpoint with another beta2, and with the moments that the checkpoint holds.

    BETA2=0.98 python -m torch.distributed.run ... -m benchmarks.other_beta2 [arguments of the run]

A resume refuses another ``--adam-beta2``, because Megatron loads the betas with the state of the
optimizer and would go on with those of the checkpoint. This is for docs/results/origins.md, on the
CPU platform; the arguments are those of the checkpoint.
"""

from __future__ import annotations

import os
import sys

from megatron_tst import pretrain
from megatron_tst.cpu.optimizer import FusedAdam


def main() -> int:
    """Returns the exit code of the run."""
    beta2, name = float(os.environ["BETA2"]), "step"
    step = getattr(FusedAdam, name)

    def step_with_beta2(optimizer: FusedAdam, closure: None = None) -> None:
        # Before each step, so that no load puts it back.
        for group in optimizer.param_groups:
            group["betas"] = (group["betas"][0], beta2)
        step(optimizer, closure)

    setattr(FusedAdam, name, step_with_beta2)
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
