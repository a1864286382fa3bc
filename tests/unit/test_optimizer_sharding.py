"""What the distributed optimizer is mended with, and when it is not touched."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tst.training import optimizer_sharding
from megatron_tst.training.optimizer_sharding import (
    fingerprint,
    mend_saved_optimizer,
    packed_index_map,
    padded_parts,
)
from megatron_tst.upstream.patches import original

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
FULLY, LOCAL = "sharded_param_state_fully_reshardable", "get_parameter_state_dp_reshardable"
# Main has mended the first, and nothing looks at what it calls.
IS_MAIN = not version("megatron-core").startswith("0.19.")
MENDED = (LOCAL,) if IS_MAIN else (FULLY, LOCAL)
NAMES = (FULLY, "get_parameter_state_dp_zero", "sharded_param_state_dp_reshardable", LOCAL)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Megatron's own functions, which are there again when the test is over."""
    functions = {name: original(f"{OPTIMIZER}.{name}") for name in NAMES}
    for name, function in functions.items():
        monkeypatch.setattr(DistributedOptimizer, name, function)
    return functions


def test_the_installed_megatron_is_mended_once(host: dict[str, Any]) -> None:
    mend_saved_optimizer()
    mend_saved_optimizer()
    for name in NAMES:
        present = getattr(DistributedOptimizer, name)
        assert (present is not host[name]) == (name in MENDED), name
        assert getattr(present, "__wrapped__", present) is host[name]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not (IS_MAIN and name == "get_parameter_state_dp_zero")]
)
def test_an_unknown_function_is_refused_by_name(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def changed(self: Any) -> None: ...

    monkeypatch.setattr(DistributedOptimizer, name, changed)
    with pytest.raises(RuntimeError, match=rf"DistributedOptimizer\.{name} of megatron-core 0\."):
        mend_saved_optimizer()


def test_a_megatron_that_is_right_is_left_alone(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path: path.rpartition(".")[2] for path in optimizer_sharding._RIGHT}
    right = {path: (fingerprint(host[name]),) for path, name in names.items()}
    monkeypatch.setattr(optimizer_sharding, "_RIGHT", right)
    mend_saved_optimizer()
    assert {name: getattr(DistributedOptimizer, name) for name in NAMES} == host


def buffer_of(buckets: list[tuple[int, int]], index_map: dict[Any, Any]) -> Any:
    made = [
        SimpleNamespace(numel_unpadded=elements, grad_data=torch.empty(padded))
        for elements, padded in buckets
    ]
    elements = sum(bucket.numel_unpadded for bucket in made)
    return SimpleNamespace(buckets=made, param_index_map=index_map, numel_unpadded=elements)


def test_offsets_do_not_count_the_padding_of_buckets_before() -> None:
    index_map = {"a": (0, 40, 0), "b": (64, 100, 0), "c": (128, 138, 1), "d": (256, 261, 2)}
    buffer = buffer_of([(100, 128), (10, 128), (5, 128)], index_map)
    packed = {"a": (0, 40, 0), "b": (64, 100, 0), "c": (100, 110, 1), "d": (110, 115, 2)}
    assert packed_index_map(buffer) == packed
    with pytest.raises(RuntimeError, match="beyond the 115 elements"):
        packed_index_map(buffer_of([(100, 100), (10, 128), (5, 128)], index_map))


def part(start: int, end: int) -> dict[str, Any]:
    value = torch.ones(end - start, dtype=torch.bfloat16)
    return {"param": value, "step": torch.tensor(3.0)} | place(start, end)


def place(start: int, end: int) -> dict[str, int]:
    return {"gbuf_local_start": start, "gbuf_local_end": end}


@pytest.mark.parametrize(
    ("parts", "saved", "padding"),
    [
        ([(0, 10), (10, 30)], 30, []),
        ([(4, 10), (16, 30)], 64, [(0, 4), (10, 16), (30, 64)]),
        # What is behind the saved elements is left out.
        ([(0, 40)], 40, []),
        ([], 8, [(0, 8)]),
        ([], 0, [(0, 0)]),
    ],
)
def test_padding_fills_a_share_up_to_what_is_saved(
    parts: list[tuple[int, int]], saved: int, padding: list[tuple[int, int]]
) -> None:
    own = [part(*ends) for ends in parts]
    filled = padded_parts(own, saved, like=part(0, 1))
    ends = [(one["gbuf_local_start"], one["gbuf_local_end"]) for one in filled]
    assert ends == sorted(parts + padding)
    added = [one for one in filled if one.get("padding")]
    assert [(one["gbuf_local_start"], one["gbuf_local_end"]) for one in added] == padding
    for one in added:
        size = one["gbuf_local_end"] - one["gbuf_local_start"]
        tensors = {name: value for name, value in one.items() if torch.is_tensor(value)}
        assert tensors.keys() == ({"param"} if size else set())
        for value in tensors.values():
            assert torch.equal(value, torch.zeros(size, dtype=torch.bfloat16))


def test_padding_between_parameters_alone_is_refused() -> None:
    with pytest.raises(RuntimeError, match="fewer data-parallel ranks"):
        padded_parts([], 8, like=None)
