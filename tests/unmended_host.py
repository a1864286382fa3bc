"""Pre-training that saves as Megatron alone does, faults included."""

from __future__ import annotations

from typing import Any

MAIN = "tests.unmended_host:main"


def main() -> int:
    """Trains as the entry point does, without what mends the host's checkpoints."""
    from megatron_tst.training import pretrain

    host: Any = pretrain
    if hasattr(host, "mend_saved_optimizer"):
        host.mend_saved_optimizer = lambda: None
    return pretrain.main()
