"""Megatron-FSDP."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path


def step_before_the_first() -> str:
    """Issue 5974: a step that only makes the state of the optimizer is counted."""
    import megatron.training

    module = import_module("megatron.core.distributed.fsdp.src.megatron_fsdp.fully_shard")
    text = inspect.getsource(module.fully_shard_optimizer)
    assert "optimizer.step()" in text
    assert '"step"' not in text, "mended: it resets the step count"
    package = Path(megatron.training.__file__).parent
    callers = [p.name for p in package.rglob("*.py") if "fully_shard_optimizer" in p.read_text()]
    return f"the step is not taken back; files of megatron.training that call it: {callers}"
