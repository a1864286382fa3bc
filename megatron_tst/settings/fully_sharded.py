"""Whether the parameters of a model can be saved in shards of torch FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def uneven_shards(
    shapes: Iterable[tuple[str, Sequence[int]]], ranks: int, is_gated: bool
) -> str | None:
    """What keeps Megatron from saving a model that FSDP2 has cut by its rows.

    Args:
        shapes: of the parameters of a rank, by name.
        ranks: data-parallel ones, those of context parallelism included.
        is_gated: whether the first projection of an MLP holds two, as with ``--swiglu``.

    Returns:
        A message naming a parameter and the remedy; None if nothing does.
    """
    context = f"--use-torch-fsdp2 over {ranks} ranks (data and context parallel)"
    remedy = "use a number of ranks that divides it, or --use-distributed-optimizer in its place"
    for name, shape in shapes:
        if shape[0] % ranks:
            return (
                f"{context} cannot be saved: they would have unequal parts of the {shape[0]} rows "
                f"of {name}, which Megatron's checkpoints have no place for; {remedy}."
            )
        if is_gated and "linear_fc1" in name and ranks > 1 and ranks % 2:
            return (
                f"{context} cannot be saved: {name} holds two projections, and a checkpoint wants "
                "each rank to have rows of one of them; use an even number of ranks, or "
                "--use-distributed-optimizer in its place."
            )
    return None
