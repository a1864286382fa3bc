"""The CPU platform: runs the unmodified Megatron training loop on CPU cores with gloo.

Megatron addresses its device as ``torch.cuda``. Where no GPU is visible, :func:`activate` gives
that name a CPU meaning, supplies the modules that upstream has only for GPUs, and picks argument
defaults that work on a CPU. Where a GPU is visible it does nothing. The rest of the project knows
it by the entry points that call :func:`activate`, and by what that says in
:mod:`megatron_tst.common.platform`.
"""

from megatron_tst.cpu.platform import activate, describe, is_active

__all__ = ["activate", "describe", "is_active"]
