"""``python -m megatron_tst.pretrain``: a ``pretrain_gpt.py`` with ``--tst-*`` flags.

Takes every Megatron argument. Launch it with torchrun, as Megatron's own script.
"""

from __future__ import annotations

import sys

from megatron_tst.common.requirements import MEGATRON_IS_MISSING, has_megatron


def main() -> int:
    """Runs on the GPUs where there are any, else on the CPU platform; returns the exit code."""
    if not has_megatron():
        print(f"error: {MEGATRON_IS_MISSING}", file=sys.stderr)
        return 2
    from megatron_tst import cpu
    from megatron_tst.cpu.platform import restart_with_allocator_settings
    from megatron_tst.upstream.patches import naming_what_is_missing

    restart_with_allocator_settings()
    with naming_what_is_missing():
        cpu.activate()

        from megatron_tst.training.pretrain import main as train

    return train()


if __name__ == "__main__":
    sys.exit(main())
