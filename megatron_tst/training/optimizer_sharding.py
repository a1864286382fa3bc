"""Mends what the distributed optimizer of Megatron-Core 0.19 saves and cannot save.

A gradient buffer is a row of buckets. Parameters begin at multiples of 64 elements, and each bucket
is padded at its end until the ranks can share it equally. Two formats get these ends wrong:

* ``--dist-ckpt-optim-fully-reshardable`` gathers the buckets without the padding at their ends and
  cuts the parameters out at offsets that count it: behind the first padded end the master weights
  and moments of a checkpoint are those of other parameters, and the last ones are zeros. Training
  goes on unharmed; a resume does not. (Megatron-LM pull request 5077 mends it behind 0.19.2.)
* The default format (``dp_reshardable``) ends in an assertion where all that a rank has of a bucket
  is padding, and writes beyond the end of a tensor, which torch refuses, where padding between
  parameters and padding at the end meet in one rank. (Pull requests 5898 and 6191, both open.)

Both are mended around Megatron's functions, none of which is copied: the first sees offsets without
padding, the second is given the padding that it would have to add. Nothing is patched until
:func:`mend_saved_optimizer` is called, so that a process which does not call it saves as Megatron.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import torch

from megatron_tst.upstream.patches import original, wrap

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_FULLY_RESHARDABLE = f"{_OPTIMIZER}.sharded_param_state_fully_reshardable"
_GATHERED = f"{_OPTIMIZER}.get_parameter_state_dp_zero"
_DP_RESHARDABLE = f"{_OPTIMIZER}.sharded_param_state_dp_reshardable"
_LOCAL = f"{_OPTIMIZER}.get_parameter_state_dp_reshardable"

# By the beginning of the SHA-256 of a function's source: those with the fault, and what they call,
# as the mends were written and tested for (0.19.2; the second of a pair is of main in August 2026).
_FAULTY = {
    _FULLY_RESHARDABLE: ("6df6392a0ebb4c79",),
    _GATHERED: ("14d11a75ad9ccd8b", "12f29a207be55ca6"),
    _DP_RESHARDABLE: ("5e103700ca80a82a",),
    _LOCAL: ("7b6112a2787577ea",),
}
# Those without: pull request 5077, on main since August 2026.
_RIGHT = {_FULLY_RESHARDABLE: ("9991f93a86e76fce",), _DP_RESHARDABLE: ()}


def mend_saved_optimizer() -> None:
    """Makes every checkpoint of the distributed optimizer complete and right. Idempotent.

    Does nothing to functions of Megatron that are known to be right.

    Raises:
        RuntimeError: Megatron lacks one of the functions, or has it in a version that is neither
            known to be right nor the one that the mend was made for.
    """
    if _has_fault(_FULLY_RESHARDABLE, calling=_GATHERED):
        wrap(_FULLY_RESHARDABLE, _at_packed_offsets)
    if _has_fault(_DP_RESHARDABLE, calling=_LOCAL):
        wrap(_LOCAL, _with_padding)


def fingerprint(function: Callable[..., Any]) -> str:
    """The beginning of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def packed_index_map(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """Where each parameter of a gradient buffer lies once no bucket is padded at its end.

    Args:
        buffer: a ``_ParamAndGradBuffer``.

    Returns:
        Of each parameter the first element, the one behind its last, and its bucket.

    Raises:
        RuntimeError: a parameter would lie beyond the end of the buffer.
    """
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    removed = [0, *accumulate(padding)]
    packed = {
        parameter: (start - removed[bucket], end - removed[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
    if any(end > buffer.numel_unpadded for _, end, _ in packed.values()):
        raise RuntimeError(
            f"megatron-core {version('megatron-core')} has parameters beyond the "
            f"{buffer.numel_unpadded} elements of their gradient buffer: its buckets are not laid "
            "out as this package expects. Install the version pinned in pyproject.toml."
        )
    return packed


def _has_fault(name: str, calling: str) -> bool:
    if fingerprint(original(name)) in _RIGHT[name]:
        return False
    for needed in (name, calling):
        found = fingerprint(original(needed))
        if found not in _FAULTY[needed]:
            raise RuntimeError(
                f"{needed} of megatron-core {version('megatron-core')} is "
                f"unknown here (SHA-256 {found}...): whether it saves the state of the optimizer "
                "rightly was not looked at. Install the version pinned in pyproject.toml."
            )
    return True


def _at_packed_offsets(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _packed(self.buffers):
            return save(self, *args, **kwargs)

    return sharded_state


@contextmanager
def _packed(buffers: list[Any]) -> Iterator[None]:
    padded = [buffer.param_index_map for buffer in buffers]
    packed = [packed_index_map(buffer) for buffer in buffers]
    try:
        for buffer, index_map in zip(buffers, packed, strict=True):
            buffer.param_index_map = index_map
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _with_padding(get_state: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_state)
    def state_with_padding(self: Any) -> Any:
        state = get_state(self)
        group = self.data_parallel_group
        for index, buffer in enumerate(self.buffers):
            for buckets in state[index].values():
                for bucket, parts in zip(buffer.buckets, buckets, strict=True):
                    size = bucket.grad_data.numel() // group.size()
                    # Elements of this rank's share in the checkpoint: without the padded end.
                    saved = min(size, max(0, bucket.numel_unpadded - group.rank() * size))
                    parts[:] = padded_parts(parts, saved, _any_part(state, buckets))
        return state

    return state_with_padding


def _any_part(state: dict[Any, Any], first: list[list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The state of any parameter of this rank, at best of the same buffer: for keys and types."""
    buffers = [first, *(b for i, of in state.items() if isinstance(i, int) for b in of.values())]
    parts = (part for buckets in buffers for parts in buckets for part in parts)
    return next((part for part in parts if "param" in part), None)


def padded_parts(
    parts: list[dict[str, Any]], saved: int, like: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Adds to a rank's share of a bucket the padding that belongs into the checkpoint.

    Args:
        parts: of each parameter its 1-D tensors by name, and where it lies within the share:
            ``gbuf_local_start`` and ``gbuf_local_end``.
        saved: elements of the share that the checkpoint has.
        like: the state of any parameter, for the names and types of the tensors of padding.

    Returns:
        The parts and zeros between and behind them, up to ``saved``; one part without tensors where
        the checkpoint has nothing of the share.

    Raises:
        RuntimeError: there is padding to write, and no parameter to tell how.
    """
    padded: list[dict[str, Any]] = []
    position = 0
    for part in [*parts, None]:
        start = saved if part is None else part["gbuf_local_start"]
        if start > position:
            padded.append(_padding(position, start, like))
        if part is not None:
            padded.append(part)
            position = part["gbuf_local_end"]
    # Megatron refuses an empty list, and looks here for the end of what it has to pad itself.
    return padded or [_part_of_padding(0, 0, {})]


def _padding(start: int, end: int, like: dict[str, Any] | None) -> dict[str, Any]:
    if like is None:
        raise RuntimeError(
            "The distributed optimizer cannot be saved: a rank has no element of any parameter, "
            "only padding between two. Use fewer data-parallel ranks for a model this small, or "
            "--dist-ckpt-optim-fully-reshardable."
        )
    tensors = {
        name: torch.zeros(end - start, dtype=value.dtype, device=value.device)
        for name, value in like.items()
        # A count of steps is of the parameter and not of its elements.
        if isinstance(value, torch.Tensor) and value.dim() > 0
    }
    return _part_of_padding(start, end, tensors)


def _part_of_padding(start: int, end: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "gbuf_local_start": start, "gbuf_local_end": end, "padding": True}
