"""Checkpoints of megatron-core."""

from __future__ import annotations

from types import SimpleNamespace

from scripts.host_faults.ranks import on_ranks


def _saved_state() -> tuple[object, bytes]:
    from megatron.core import parallel_state
    from megatron.training import checkpointing, global_vars

    global_vars.set_args(SimpleNamespace(data_parallel_random_init=False))
    saved = checkpointing.get_rng_state(
        "torch_dist",
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    streams = saved.data[0]["rng_tracker_states"]
    identity = (saved.key, saved.global_offset, saved.replica_id)
    return identity, streams["expert-parallel-rng"].numpy().tobytes()


def random_state_of_experts() -> str:
    """PR 6858: one rank's random state is saved for all, though expert ranks have their own."""
    places, streams = zip(*on_ranks(2, _saved_state, expert_model_parallel_size=2), strict=True)
    assert streams[0] != streams[1]
    assert places[0][:2] == places[1][:2], "mended"
    return f"ranks with other streams save them in one place, as copies: {places}"
