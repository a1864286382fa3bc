"""The fused halves of a layer against Megatron's modules, where the CPU platform is on.

Run by ``tests/unit/test_cpu_fused_layer.py``, each in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.cpu_layers import build_layer, build_model, initialise, inputs, rotation

Results = dict[str, Tensor]


def main() -> None:
    """Runs the check that the command line names."""
    initialise()
    globals()[sys.argv[1]]()


@contextmanager
def upstream() -> Iterator[None]:
    """Megatron's own methods of a layer."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    names = "_forward_attention", "_forward_mlp"
    fused = {name: getattr(TransformerLayer, name) for name in names}
    for name, function in fused.items():
        setattr(TransformerLayer, name, function.__wrapped__)
    try:
        yield
    finally:
        for name, function in fused.items():
            setattr(TransformerLayer, name, function)


@contextmanager
def calls() -> Iterator[list[str]]:
    """Which halves are called."""
    from megatron_tst.cpu import fused_layer

    made: list[str] = []
    halves = {"attention": fused_layer.AttentionHalf, "mlp": fused_layer.MLPHalf}

    def spy(name: str, half: Any) -> Any:
        def apply(*args: Any) -> Any:
            made.append(name)
            return half.apply(*args)

        return type(half.__name__, (), {"apply": staticmethod(apply)})

    module: Any = fused_layer
    module.AttentionHalf, module.MLPHalf = (spy(*item) for item in halves.items())
    try:
        yield made
    finally:
        module.AttentionHalf, module.MLPHalf = halves.values()


def run(layer: Any, x: Tensor, grad: Tensor, **arguments: Any) -> Results:
    """The output of a layer and all gradients."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    arguments.setdefault("rotary_pos_emb", rotation(len(x)))
    output, _ = layer(hidden_states=leaf, attention_mask=None, **arguments)
    output.backward(grad)
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert leaf.grad is not None
    return {"output": output.detach(), "x": leaf.grad, **gradients}


def assert_same(first: Results, second: Results) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# Where it is taken.


def check_float32() -> None:
    for groups, length in ((4, 37), (2, 37), (1, 5), (2, 1), (2, 300)):
        layer = build_layer(num_query_groups=groups)
        x, grad = inputs(length=length)
        with calls() as made:
            found = run(layer, x, grad)
        assert made == ["attention", "mlp"]
        with upstream():
            expected = run(layer, x, grad)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            # Sums in float32 in another order, through two halves.
            limit = 1e-5 * float(expected[name].abs().max())
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=limit, msg=name)


def check_bfloat16() -> None:
    for groups, length in ((4, 37), (2, 37), (2, 300)):
        narrow = build_layer(torch.bfloat16, num_query_groups=groups)
        x, grad = inputs(torch.bfloat16, length)
        with calls() as made:
            found = run(narrow, x, grad)
        assert made == ["attention", "mlp"]
        with upstream():
            unfused = run(narrow, x, grad)
            # The same numbers, computed in float32.
            expected = run(narrow.float(), x.float(), grad.float())
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16
            ours, theirs = error(tensor, expected[name]), error(unfused[name], expected[name])
            # Of a few hundred numbers of 8 digits; a single rounding has 0.2 per cent.
            assert ours <= 1.5 * theirs + 5e-4, (name, ours, theirs)


def check_same_bits_twice() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = build_layer(dtype)
        assert_same(run(layer, *inputs(dtype)), run(layer, *inputs(dtype)))


def check_two_micro_batches_accumulate() -> None:
    layer = build_layer()
    x, grad = inputs()
    alone = [run(layer, part, grad) for part in (x, x * 2)]
    layer.zero_grad()
    outputs = [
        layer(hidden_states=part, attention_mask=None, rotary_pos_emb=rotation())[0]
        for part in (x, x * 2)
    ]
    # As a pipeline has it: both forward passes before the backward passes.
    for output in outputs:
        output.backward(grad)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, alone[0][name] + alone[1][name]), name


def check_gradients_twice_of_one_graph() -> None:
    layer = build_layer()
    x, grad = inputs()
    leaf = x.requires_grad_()
    output, _ = layer(hidden_states=leaf, attention_mask=None, rotary_pos_emb=rotation())
    weights = [leaf, *layer.parameters()]
    first = torch.autograd.grad(output, weights, grad, retain_graph=True)
    second = torch.autograd.grad(output, weights, grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def check_inputs_that_are_not_contiguous() -> None:
    layer = build_layer()
    x, grad = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in inputs())
    assert not x.is_contiguous()
    assert_same(run(layer, x, grad), run(layer, *inputs()))


def check_frozen_weights() -> None:
    layer = build_layer()
    expected = run(layer, *inputs())
    layer.zero_grad()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("qkv" in name)
    x, grad = inputs()
    output, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotation())
    output.backward(grad)
    for name, parameter in layer.named_parameters():
        if "qkv" in name:
            assert torch.equal(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


def check_training_after_inference_mode() -> None:
    layer = build_layer()
    x, grad = inputs()
    with torch.inference_mode(), calls() as made:
        angles = rotation()
        layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)
    assert made == ["attention", "mlp"]
    # Megatron keeps the angles of a length.
    assert angles.is_inference()
    found = run(layer, x, grad, rotary_pos_emb=angles)
    assert_same(found, run(layer, x, grad))


def check_full_recomputation() -> None:
    from tests.cpu_layers import BATCH, LENGTH, VOCABULARY

    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    recompute: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    results = []
    models = build_model(), build_model(**recompute)
    models[1].load_state_dict(models[0].state_dict())
    for model, times in zip(models, (1, 2), strict=True):
        with calls() as made:
            model(tokens, positions, None, labels=tokens).mean().backward()
        assert sorted(made) == ["attention"] * 2 * times + ["mlp"] * 2 * times
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*results)


# Where it is not.


def compare(expected_calls: list[str], layer: Any, **arguments: Any) -> None:
    """Requires these calls of a half and, without any, the bits of upstream."""
    x, grad = inputs(next(layer.parameters()).dtype)
    torch.manual_seed(3)
    with calls() as made:
        found = run(layer, x, grad, **arguments)
    assert made == expected_calls, made
    torch.manual_seed(3)
    with upstream():
        expected = run(layer, x, grad, **arguments)
    for name, tensor in found.items():
        limit = 1e-5 * float(expected[name].abs().max()) if expected_calls else 0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=limit, msg=name)


def check_settings_that_are_not_usual() -> None:
    from functools import partial

    gelu = partial(torch.nn.functional.gelu, approximate="none")
    compare(["mlp"], build_layer(qk_layernorm=True))
    compare([], build_layer(add_bias_linear=True))
    compare(["mlp"], build_layer(add_qkv_bias=True))
    compare([], build_layer(normalization="LayerNorm"))
    compare(["attention"], build_layer(activation_func=gelu))
    compare(["attention"], build_layer(gated_linear_unit=False))
    compare(["mlp"], build_layer(rotary_interleaved=True))
    compare(["mlp"], build_layer(), rotary_pos_emb=None)
    # A rotation of a part of each head.
    compare(["mlp"], build_layer(), rotary_pos_emb=rotation(size=8))
    # float64 and float16 have no kernels.
    compare([], build_layer(torch.float64))
    compare(["attention", "mlp"], build_layer())


def check_layers_without_a_half() -> None:
    """As in a hybrid of attention and MLP layers."""
    from megatron.core.transformer.identity_op import IdentityOp

    for name, norm, expected in (
        ("self_attention", "input_layernorm", ["mlp"]),
        ("mlp", "pre_mlp_layernorm", ["attention"]),
    ):
        layer = build_layer()
        x, _ = inputs()
        setattr(layer, norm, IdentityOp())
        setattr(layer, name, _Nothing())
        with calls() as made:
            found, _ = layer(x, attention_mask=None, rotary_pos_emb=rotation())
        assert made == expected
        with upstream():
            again, _ = layer(x, attention_mask=None, rotary_pos_emb=rotation())
        torch.testing.assert_close(found, again, rtol=1e-5, atol=1e-4)


class _Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def check_dropout() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = {name: state.clone() for name, state in tracker.get_states().items()}

    def run_seeded(layer: Any) -> Results:
        torch.manual_seed(3)
        tracker.set_states({name: state.clone() for name, state in states.items()})
        return run(layer, *inputs())

    for setting, expected in (("hidden_dropout", []), ("attention_dropout", ["mlp"])):
        settings: dict[str, Any] = {setting: 0.25}
        layer = build_layer(**settings)
        # TorchScript compiles dropout at the second call, and then draws other numbers.
        for _ in range(3):
            run_seeded(layer)
        with calls() as made:
            found = run_seeded(layer)
        assert made == expected, setting
        with upstream():
            unfused = run_seeded(layer)
        for name, tensor in found.items():
            limit = 1e-5 * float(unfused[name].abs().max())
            torch.testing.assert_close(tensor, unfused[name], rtol=0, atol=limit, msg=name)
        dropped = run_seeded(build_layer())["output"]
        assert (dropped - found["output"]).abs().max() > 1e-2


def check_attention_mask() -> None:
    layer = build_layer()
    x, _ = inputs()
    mask = torch.ones(1, 1, len(x), len(x), dtype=torch.bool).triu(3)
    arguments = {"attention_mask": mask, "rotary_pos_emb": rotation()}
    with calls() as made:
        found, _ = layer(x, **arguments)
        # By position, as by name.
        again, _ = layer(x, mask, None, None, arguments["rotary_pos_emb"])
    assert made == ["mlp", "mlp"]
    assert torch.equal(again, found)
    with upstream():
        expected, _ = layer(x, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    causal, _ = layer(x, attention_mask=None, rotary_pos_emb=rotation())
    assert (causal - found).abs().max() > 1e-2


def check_packed_sequences() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    layer = build_layer()
    x, _ = inputs()
    x = x[:, :1]
    bounds = torch.tensor([0, 10, len(x)], dtype=torch.int32)
    documents = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=27, max_seqlen_kv=27)
    arguments = {"attention_mask": None, "rotary_pos_emb": rotation()}
    with calls() as made:
        found, _ = layer(x, packed_seq_params=documents, **arguments)
        alone, _ = layer(x[:10], attention_mask=None, rotary_pos_emb=rotation(10))
    assert made == ["mlp", "attention", "mlp"]
    torch.testing.assert_close(found[:10], alone, rtol=1e-5, atol=1e-5)


def _hooks(module: nn.Module, fired: list[str]) -> list[Callable[[], Any]]:
    def note(*_: Any) -> None:
        fired.append(type(module).__name__)

    return [
        lambda: module.register_forward_hook(note),
        lambda: module.register_forward_pre_hook(note),
        lambda: module.register_full_backward_hook(note),
        lambda: module.register_full_backward_pre_hook(note),
    ]


def check_hooks_of_submodules_fire() -> None:
    layer = build_layer()
    expected = run(layer, *inputs())
    attention: tuple[str, ...] = ("input_layernorm", "self_attention", "self_attention.linear_qkv")
    attention += ("self_attention.core_attention", "self_attention.linear_proj")
    mlp = ("pre_mlp_layernorm", "mlp", "mlp.linear_fc1", "mlp.linear_fc2")
    for names, other in ((attention, ["mlp"]), (mlp, ["attention"])):
        for name in names:
            fired: list[str] = []
            for register in _hooks(layer.get_submodule(name), fired):
                fired.clear()
                handle = register()
                with calls() as made:
                    run(layer, *inputs())
                handle.remove()
                assert made == other, name
                assert len(fired) == 1, name
    # Afterwards it is taken again.
    with calls() as made:
        assert_same(run(layer, *inputs()), expected)
    assert made == ["attention", "mlp"]


def check_hooks_of_all_modules_fire() -> None:
    layer = build_layer()
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    with calls() as made:
        run(layer, *inputs())
    handle.remove()
    assert made == []
    assert {"RMSNorm", "ColumnParallelLinear", "RowParallelLinear", "MLP"} <= set(names)


def check_replaced_modules_are_called() -> None:
    """Adapters replace modules, or their forward, also after the first step."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.mlp import MLP

    class OtherLinear(ColumnParallelLinear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, bias = super().forward(*args, **kwargs)
            return output * 2, bias

    class OtherMLP(MLP):
        pass

    layer = build_layer()
    compare(["attention", "mlp"], layer)
    layer.self_attention.linear_qkv.__class__ = OtherLinear
    fresh = build_layer()
    fresh.self_attention.linear_qkv.__class__ = OtherLinear
    compare(["mlp"], fresh)
    fresh.mlp.__class__ = OtherMLP
    compare([], _renewed(fresh))

    layer = build_layer()
    compare(["attention", "mlp"], layer)
    original = layer.mlp.linear_fc1
    layer.mlp.linear_fc1 = fresh.self_attention.linear_qkv.__class__.__new__(OtherLinear)
    layer.mlp.linear_fc1.__dict__.update(original.__dict__)
    compare(["attention"], layer)
    layer.mlp.linear_fc1 = original
    compare(["attention", "mlp"], layer)

    forward = original.forward
    original.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 2, None)
    compare(["attention"], layer)


def _renewed(layer: Any) -> Any:
    for name in ("_fused_attention", "_fused_mlp"):
        layer.__dict__.pop(name, None)
    return layer


def check_autocast() -> None:
    layer = build_layer()
    with torch.autocast("cpu", torch.bfloat16):
        compare([], layer)


def check_tensor_parallelism_and_others_are_refused() -> None:
    from megatron_tst.cpu.layer_halves import attention_half, mlp_half

    layer = build_layer()
    assert attention_half(layer) is not None
    assert mlp_half(layer) is not None
    for name, value in {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "sequence_parallel": True,
        "fp32_residual_connection": True,
        "gradient_accumulation_fusion": True,
        "delay_wgrad_compute": True,
    }.items():
        before = getattr(layer.config, name)
        setattr(layer.config, name, value)
        assert attention_half(layer) is None, name
        assert mlp_half(layer) is None, name
        setattr(layer.config, name, before)
    assert attention_half(layer) is not None


def check_without_kernels() -> None:
    """In a process where they are switched off."""
    from megatron_tst.ops.native import describe_kernels, kernels

    assert kernels() is None, describe_kernels()
    compare([], build_layer())
