"""Names that training arguments had in checkpoints of older releases of Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from megatron_tst.common.errors import UsageError

_ALIASES = {
    # Until core 0.15.
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    # Until core 0.16.
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Old name, and the one of today (``add_megatron_arguments`` of both releases)."""


def add_current_names(args: Namespace) -> None:
    """Gives arguments that have an older name today's name as well.

    Args:
        args: training arguments of a checkpoint, changed in place. The old names stay, because
            Megatron looks for some of them.
    """
    for old, new in _ALIASES.items():
        value = getattr(args, old, None)
        if value is not None and getattr(args, new, None) is None:
            setattr(args, new, value)


def check_present(args: Namespace, names: Iterable[str]) -> None:
    """Refuses a checkpoint whose training arguments lack some.

    Args:
        args: training arguments of the checkpoint.
        names: of those that are needed.

    Raises:
        UsageError: naming the ones that are absent.
    """
    absent = [name for name in names if not hasattr(args, name)]
    if absent:
        raise UsageError(
            f"the training arguments in the checkpoint have no {', '.join(absent)}: Megatron of "
            "another release saved it, or another program. Load it and save it again with "
            "Megatron-Core 0.19.2."
        )
