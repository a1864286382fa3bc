"""What training asks of the machine it runs on; whoever makes another one fit says it here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """A kind of machine; the default is Megatron's own, with GPUs.

    Attributes:
        has_gpu: whether it is that one.
        refuse_arguments: raises a :class:`~megatron_tst.common.errors.UsageError` for parsed
            arguments that it cannot serve.
        set_defaults: gives Megatron's parser the defaults that work on it, and returns it.
        describe: how it computes in this process, for people and records.
    """

    has_gpu: bool = True
    refuse_arguments: Callable[[argparse.Namespace], None] = lambda args: None
    set_defaults: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] = lambda it: it
    describe: Callable[[], dict[str, str]] = dict


GPUS = Platform()

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""The environment variable with the number of queues of kernels of a GPU."""

_platform = GPUS


def platform() -> Platform:
    """The one that this process runs on."""
    return _platform


def run_on(other: Platform) -> None:
    """Makes this process run on another one."""
    global _platform
    _platform = other


def pose_connections(args: argparse.Namespace) -> None:
    """Sets the queues of kernels that Megatron's validation asks for, where there is no GPU.

    It wants one with tensor or context parallelism, and more with FSDP.

    Args:
        args: parsed, not validated.
    """
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        os.environ.pop(CONNECTIONS, None)
    else:
        os.environ.setdefault(CONNECTIONS, "1")
