"""Whether a launch sets the queues of kernels that Megatron asserts when it starts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import torch

from megatron_tst.common.platform import CONNECTIONS
from megatron_tst.preflight.findings import Finding, error, note


def connection_findings(
    args: argparse.Namespace, environment: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Errors where Megatron ends over the variable, which validation here does not look at.

    The process must have called ``rank_simulation.assume_machine``.

    Args:
        args: parsed, not validated.
        environment: of the launch; None if it is unknown.
    """
    several, one = _needs_several(args), _needs_one(args)
    if environment is None:
        if several:
            yield note(
                f"{CONNECTIONS} was assumed not to be 1, with which {several} ends: unset it."
            )
        elif one:
            yield note(f"{CONNECTIONS} was assumed to be 1, without which {one} ends: export it.")
        return
    value = environment.get(CONNECTIONS)
    if several and value == "1":
        yield error(
            f"{CONNECTIONS} is 1 in the launch, and Megatron ends over it with {several}: unset it."
        )
    if one and value != "1":
        state = "is not set" if value is None else f"is {value!r}"
        yield error(
            f"{CONNECTIONS} {state} in the launch, and Megatron ends without a 1 with {one}: "
            f"export {CONNECTIONS}=1."
        )


def _needs_several(args: argparse.Namespace) -> str | None:
    """The argument that does not start with one queue."""
    if args.use_torch_fsdp2:
        return "--use-torch-fsdp2"
    if args.use_megatron_fsdp:
        return "--use-megatron-fsdp"
    if args.pipeline_model_parallel_comm_backend == "ucc":
        return "--pipeline-model-parallel-comm-backend ucc"
    return None


def _needs_one(args: argparse.Namespace) -> str | None:
    """The argument that starts with one queue only."""
    major, minor = torch.cuda.get_device_capability()
    is_free = (
        args.use_torch_fsdp2 or args.use_megatron_fsdp or args.overlap_moe_expert_parallel_comm
    )
    if major >= 10 or is_free:
        return None
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        if getattr(args, name) > 1:
            flag = name.replace("_", "-")
            where = f"compute capability {major}.{minor} (--compute-capability)"
            return f"--{flag} {getattr(args, name)} at {where}"
    return None
