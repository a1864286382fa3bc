"""The CPU platform: runs the unmodified Megatron training loop on CPU cores with gloo.

Megatron addresses its device as ``torch.cuda``. Where no GPU is visible, :func:`activate` gives
that name a CPU meaning, supplies the modules that upstream has only for GPUs, and picks argument
defaults that work on a CPU. Where a GPU is visible it does nothing. No other package of the project
knows that this one exists, apart from the entry points that call :func:`activate`.
"""

from megatron_tst.cpu.platform import activate, is_active

__all__ = ["activate", "is_active"]
