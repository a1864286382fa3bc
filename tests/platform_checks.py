"""What must hold in a process where the CPU platform is on, or refuses to be.

The platform changes the whole process: these functions run in processes of their own, which
``tests/unit/test_cpu_platform.py`` starts.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

CUDA_DEVICES = ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0)

PATCHED_NAMESPACES = (
    "torch",
    "torch.Tensor",
    "torch.nn.Module",
    "torch.cuda",
    "torch.cuda.random",
    "torch.accelerator",
    "torch.distributed",
    "torch.optim",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel",
    "megatron.core.models.backends.LocalSpecProvider",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.models.hybrid.hybrid_block",
    "megatron.core.datasets.utils",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.inference_layers",
    "megatron.core.transformer.mlp",
    "megatron.core.transformer.mlp.MLP",
    "megatron.core.transformer.moe.shared_experts",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.torch_norm.WrappedTorchNorm",
)


def main() -> None:
    """Runs the check that the command line names."""
    globals()[sys.argv[1]]()


def symbols() -> dict[str, int]:
    """Identity of every symbol of the name spaces that the platform touches."""
    found = {}
    for namespace in PATCHED_NAMESPACES:
        try:
            owner = import_module(namespace)
        except ModuleNotFoundError:
            module, name = namespace.rsplit(".", 1)
            owner = getattr(import_module(module), name)
        found.update({f"{namespace}.{name}": id(value) for name, value in vars(owner).items()})
    return found


# Activation.


def check_second_activation_changes_nothing() -> None:
    from megatron_tst import cpu

    before = symbols()
    assert cpu.activate()
    assert cpu.is_active()
    assert symbols() == before


def check_operators_pay_for_no_function_mode() -> None:
    assert torch._C._len_torch_function_stack() == 0


def check_megatron_uses_the_replacements() -> None:
    from megatron.core import optimizer, tensor_parallel
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import inference_layers
    from megatron.core.transformer import mlp
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tst.cpu import swiglu
    from megatron_tst.cpu.attention import CoreAttention
    from megatron_tst.cpu.norm import RMSNorm
    from megatron_tst.cpu.optimizer import FusedAdam

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm"
    )
    assert type(WrappedTorchNorm(config, 8)) is RMSNorm
    assert LocalSpecProvider().core_attention() is CoreAttention
    assert optimizer.Adam is optimizer.distrib_optimizer.Adam is FusedAdam
    assert not optimizer.USING_PYTORCH_OPTIMIZER
    # Megatron's main asks it of layers that multi-token prediction builds.
    assert not isinstance(nn.Linear(1, 1), inference_layers.InferenceColumnParallelLinear)
    assert not isinstance(nn.Linear(1, 1), inference_layers.InferenceLayerNormColumnParallelLinear)
    # Other code of the process keeps torch's own.
    assert torch.optim.Adam.__module__ == "torch.optim.adam"
    assert torch.optim.AdamW.__module__ == "torch.optim.adamw"
    assert mlp.bias_swiglu_impl is swiglu.bias_swiglu
    for wrapped in (
        rope_utils._apply_rotary_pos_emb_bshd,
        tensor_parallel.vocab_parallel_cross_entropy,
        mlp.MLP.forward,
    ):
        assert hasattr(wrapped, "__wrapped__"), wrapped


def stay_inert_beside_a_gpu() -> None:
    """To be run where the platform is off."""
    from megatron_tst import cpu

    torch.cuda.is_available = lambda: True
    before, environment = symbols(), dict(os.environ)
    assert not cpu.activate()
    assert not cpu.is_active()
    assert symbols() == before
    assert dict(os.environ) == environment


def message_about_version(installed: str) -> str:
    """To be run where the platform is off: what activation says about a Megatron release."""
    from megatron_tst.cpu import platform

    platform.__dict__["version"] = lambda name: installed
    before = symbols()
    message = _message_of_activation()
    assert symbols() == before
    return message


def message_about_missing(module: str, name: str) -> str:
    """To be run where the platform is off: what activation says without a Megatron symbol."""
    delattr(import_module(module), name)
    return _message_of_activation()


def _message_of_activation() -> str:
    from megatron_tst import cpu

    try:
        cpu.activate()
    except RuntimeError as error:
        assert not cpu.is_active()
        return str(error)
    raise AssertionError("activated")


# Devices.


def check_factories_build_on_the_cpu() -> None:
    from megatron_tst.cpu.devices import _FACTORIES

    x = torch.zeros(3)
    arguments: dict[str, tuple[Any, ...]] = {
        "arange": (3,),
        "as_tensor": ([1.0],),
        "full": ((2,), 1.0),
        "full_like": (x, 1.0),
        "linspace": (0, 1, 3),
        "logspace": (0, 1, 3),
        "randint": (5, (2,)),
        "tensor": ([1.0],),
        "tril_indices": (2, 2),
        "triu_indices": (2, 2),
    }
    for name in _FACTORIES:
        default = (x,) if name.endswith("_like") else (3,)
        for device in CUDA_DEVICES:
            built = getattr(torch, name)(*arguments.get(name, default), device=device)
            assert built.device.type == "cpu", name


def check_conversions_stay_on_the_cpu() -> None:
    x = torch.arange(3.0)
    for device in CUDA_DEVICES:
        converted = {
            "to": x.to(device),
            "to, dtype": x.to(device, torch.float64),
            "to, keywords": x.to(device=device, dtype=torch.bfloat16, non_blocking=True),
            "new_empty": x.new_empty(3, device=device),
            "new_full": x.new_full((3,), 1.0, device=device),
            "new_ones": x.new_ones(3, device=device),
            "new_tensor": x.new_tensor([1.0], device=device),
            "new_zeros": x.new_zeros(3, device=device),
            "cuda": x.cuda(device, non_blocking=True),
        }
        for name, result in converted.items():
            assert result.device.type == "cpu", name
        assert converted["to"] is x
        assert converted["to, dtype"].dtype == torch.float64
        assert converted["to, keywords"].dtype == torch.bfloat16
    assert x.to(device="cuda", copy=True) is not x


def check_modules_stay_on_the_cpu() -> None:
    for device in CUDA_DEVICES:
        module = nn.Linear(2, 2)
        assert module.to(device) is module
        assert module.to(device=device, dtype=torch.float64).weight.dtype == torch.float64
        assert module.cuda(0) is module
        assert module.weight.device.type == "cpu"
    built_on_meta = nn.Linear(2, 2, device="meta")
    assert built_on_meta.to_empty(device=torch.device("cuda")).weight.device.type == "cpu"


def check_other_devices_and_dtypes_are_untouched() -> None:
    x = torch.zeros(2)
    assert torch.zeros(2, device="meta").is_meta
    assert torch.empty_like(x, device=torch.device("meta")).is_meta
    assert x.new_zeros(2, device="meta").is_meta
    assert x.to("meta").is_meta
    assert nn.Linear(2, 2).to("meta").weight.is_meta
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
    for device in ("cpu", torch.device("cpu"), None):
        assert torch.zeros(2, device=device).device.type == "cpu"
    assert x.to("cpu") is x
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(torch.zeros(1, dtype=torch.int32)).dtype == torch.int32


def check_type_names_are_those_of_cuda_tensors() -> None:
    for dtype, name in ((torch.float32, "Float"), (torch.bfloat16, "BFloat16")):
        assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def check_pinning_does_nothing() -> None:
    x = torch.zeros(2, pin_memory=True)
    assert x.pin_memory() is x
    samples: Any = [1, 2]
    loader: Any = torch.utils.data.DataLoader(samples, batch_size=2, pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[1, 2]]


def check_streams_and_events_follow_program_order() -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream()
    start.record()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.current_stream())
        torch.ones(1000).sum()
        end.record(side)
    torch.cuda.current_stream().wait_event(end)
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 60_000


# Random numbers.


def check_full_iteration_graphs_take_no_batch_of_another_shape() -> None:
    """Why they are refused: a graph reads the memory of the first batches."""
    from megatron.core.full_cuda_graph import StaticBufferLoader

    loader = StaticBufferLoader()
    copy = loader({"tokens": torch.zeros(2, 8, 4)}, "training", 0)
    assert loader({"tokens": torch.ones(2, 8, 4)}, "training", 0)["tokens"] is copy["tokens"]
    with pytest.raises(RuntimeError, match="must match"):
        loader({"tokens": torch.zeros(2, 8)}, "training", 0)


def check_cuda_generator_is_the_default_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(4), expected)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)
    torch.cuda.random.set_rng_state(state, "cuda")
    assert torch.equal(torch.rand(4), expected)


def check_tracked_generators_are_independent() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("other", 2)
        outside, inside = [], []
        for _ in range(2):
            outside.append(torch.rand(3))
            with tracker.fork("other"):
                inside.append(torch.rand(3))
        return torch.cat(outside), torch.cat(inside)

    outside, inside = draws()
    assert all(torch.equal(*pair) for pair in zip((outside, inside), draws(), strict=True))
    for seed, expected in ((1, outside), (2, inside)):
        torch.manual_seed(seed)
        assert torch.equal(torch.cat([torch.rand(3), torch.rand(3)]), expected)


def check_attention_drops_weights_by_the_model_parallel_generator() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tst.cpu.attention import FusedCoreAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0.25
    )
    layer = FusedCoreAttention(config, 1, AttnMaskType.causal, "self")
    query, key = torch.zeros(64, 1, 2, 4), torch.zeros(64, 1, 2, 4)
    value = torch.ones(64, 1, 2, 4, requires_grad=True)
    tracker = get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", 3)
    states = tracker.get_states()
    before = torch.get_rng_state()
    dropped = layer(query, key, value, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(layer(query, key, value, None), dropped)
    tracker.set_states(states)
    assert torch.equal(layer(query, key, value, None), dropped)
    # Position i keeps each of its i + 1 equal weights with probability 3/4, scaled by 4/3.
    kept = dropped[..., 0].squeeze() * torch.arange(1, 65) * 0.75
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    assert 0.7 < float(kept.sum()) / (64 * 65 / 2) < 0.8
    dropped.sum().backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad.sum(), dropped.sum())
    torch.testing.assert_close(layer.eval()(query, key, value, None), torch.ones(64, 1, 8))


# Optimizer.


def check_norm_and_scale_match_upstream() -> None:
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    from megatron_tst.cpu.optimizer import l2_norm, scale

    overflow = torch.zeros(1, dtype=torch.int32)
    tensors = [torch.randn(shape) for shape in ((3, 5), (7,), (1,))]
    norm, _ = l2_norm(1, overflow, [tensors], False)
    expected, _ = local_multi_tensor_l2_norm(1, overflow, [tensors], False)
    assert norm.shape == expected.shape
    torch.testing.assert_close(norm, expected)
    for dtype in (torch.float32, torch.bfloat16):
        for factor in (1.0, 0.3):
            ours, theirs = ([torch.empty_like(x, dtype=dtype) for x in tensors] for _ in range(2))
            scale(1, overflow, [tensors, ours], factor)
            local_multi_tensor_scale(1, overflow, [tensors, theirs], factor)
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    expected_in_place = [x * 0.3 for x in tensors]
    scale(1, overflow, [tensors, tensors], 0.3)
    assert all(torch.equal(*pair) for pair in zip(tensors, expected_in_place, strict=True))


# Reports.


def check_memory_reports_are_resident_bytes() -> None:
    stats = torch.cuda.memory_stats()
    # The keys that --log-memory-to-tensorboard reads.
    for key in ("reserved_bytes.all", "allocated_bytes.all"):
        assert stats[f"{key}.current"] > 1e6
    assert stats["allocated_bytes.all.peak"] >= stats["allocated_bytes.all.current"]
    assert "allocation.all.current" in stats
    assert torch.cuda.memory_allocated() > 1e6
    assert torch.cuda.device_memory_used() > 1e6
