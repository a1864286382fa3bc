"""Activations that preflight counts with recomputation, and the sizes that it counts them from.

What the CPU platform runs is measured on Megatron's own modules: ``tests/preflight_measured.py``.
"""

from __future__ import annotations

import shlex

import pytest

from tests.preflight_checked import Checked

GIB = 1 << 30
_SMALL = shlex.split(
    "--bf16 --transformer-impl local --hidden-size 96 --ffn-hidden-size 256 "
    "--num-attention-heads 8 --kv-channels 16 --group-query-attention --num-query-groups 4 "
    "--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 32 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--padded-vocab-size 256 --vocab-size 256 --train-iters 10 --lr 1e-3 "
    "--no-rope-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm"
)
_EXPERTS = shlex.split(
    "--num-experts 8 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-token-dispatcher-type "
    "alltoall --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 48"
)
_LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm"
)


def _without(argv: list[str], words: str) -> list[str]:
    """Without words that follow each other."""
    return shlex.split(shlex.join(argv).replace(f" {words} ", " "))


def _without_groups(argv: list[str]) -> list[str]:
    return _without(argv, "--group-query-attention --num-query-groups 4")


def _for_gpu(argv: list[str]) -> list[str]:
    """Layers of Transformer Engine, with norms inside of linear layers."""
    return _without(argv, "--transformer-impl local")


_MODELS = {
    "dense": _SMALL,
    "experts": [*_SMALL, *_EXPERTS],
    "ungrouped": _without_groups(_SMALL),
    "latent": [*_without_groups(_SMALL), *_LATENT],
    "gated": [*_SMALL, "--attention-output-gate"],
}
_POSITIONS = 2 * 128
_SELECTIVE = "--recompute-granularity selective"
_FULL = "--recompute-granularity full --recompute-method"
# What the CPU's modules keep and fused ones of a GPU do not, in bytes a position: attention each
# key and value for all heads, or what the value lies in, SwiGLU its sigmoid and,
# with weights, its unweighted result.
_HEADS_HERE, _VALUES_HERE = 2 * 2 * (128 - 64), 2 * 2 * 128
_DENSE, _ROUTED, _SHARED = 2 * 256, 2 * 2 * 2 * 64, 2 * 48
# Model, arguments, layers of two models that are compared, what is more here.
MEASURED: dict[str, tuple[str, str, tuple[int, int], int]] = {
    "nothing": ("dense", "", (2, 3), _HEADS_HERE + _DENSE),
    "without groups": ("ungrouped", "", (2, 3), _VALUES_HERE + _DENSE),
    "by default": ("dense", "--recompute-activations", (2, 3), _DENSE),
    "attention": ("dense", f"{_SELECTIVE} --recompute-modules core_attn", (2, 3), _DENSE),
    "gated attention": ("gated", f"{_SELECTIVE} --recompute-modules core_attn", (2, 3), _DENSE),
    "MLP": ("dense", f"{_SELECTIVE} --recompute-modules mlp", (2, 3), _HEADS_HERE),
    "norms": ("dense", f"{_SELECTIVE} --recompute-modules layernorm", (2, 3), _HEADS_HERE + _DENSE),
    # Of the norms of the latents, which are apart here and in the projections on a GPU.
    "up projection": (
        "latent",
        f"{_SELECTIVE} --recompute-modules mla_up_proj",
        (2, 3),
        _DENSE + 2 * (48 + 32),
    ),
    "MLP of experts": (
        "experts",
        f"{_SELECTIVE} --recompute-modules mlp",
        (2, 3),
        _HEADS_HERE + _ROUTED + _SHARED,
    ),
    "experts": ("experts", f"{_SELECTIVE} --recompute-modules moe", (2, 3), _HEADS_HERE),
    "experts, the old way": ("experts", "--moe-layer-recompute", (2, 3), 0),
    "shared expert": (
        "experts",
        f"{_SELECTIVE} --recompute-modules shared_experts",
        (2, 3),
        _HEADS_HERE + _ROUTED,
    ),
    "experts of a dense model": (
        "dense",
        f"{_SELECTIVE} --recompute-modules moe",
        (2, 3),
        _HEADS_HERE + _DENSE,
    ),
    "block, within": ("dense", f"{_FULL} block --recompute-num-layers 4", (2, 3), 0),
    "block, beyond": (
        "dense",
        f"{_FULL} block --recompute-num-layers 1",
        (2, 3),
        _HEADS_HERE + _DENSE,
    ),
    "uniform": ("dense", f"{_FULL} uniform --recompute-num-layers 1", (2, 3), 0),
    "uniform, within": ("dense", f"{_FULL} uniform --recompute-num-layers 2", (3, 4), 0),
    "uniform, beyond": ("dense", f"{_FULL} uniform --recompute-num-layers 2", (4, 5), 0),
}


# What the depths keep, in bytes a position: Megatron's loss on a CPU keeps its logits in fp32.
_LOGITS = 4 * 256
_ONE = f"{_FULL} uniform --recompute-num-layers 1"
_BLOCK = f"{_FULL} block --recompute-num-layers 1"
_PATTERNS = ("*-/*-/*-", "*-/*-/*-/*-")
DEPTHS: dict[str, tuple[str, tuple[object, object], int]] = {
    "depths, uniform": (_ONE, (2, 3), _LOGITS),
    "depths, block": (_BLOCK, (2, 3), _LOGITS + _HEADS_HERE + _DENSE),
    "depths of a hybrid, uniform": (_ONE, _PATTERNS, _LOGITS),
    # Attention keeps its input, and the MLP everything.
    "depths of a hybrid, block": (_BLOCK, _PATTERNS, _LOGITS + _DENSE),
}
_TENSOR_2 = "--tensor-model-parallel-size 2"
# Model, arguments, GPUs, and bytes a position by hand that each layer keeps.
BY_HAND: dict[str, tuple[str, str, int, float]] = {
    # Four of h = 96, queries of 128 with keys and values of 64, the output, three of f = 256.
    "whole": ("dense", "", 1, 2 * (4 * 96 + 128 + 2 * 64 + 128 + 3 * 256)),
    # A key head each, of the two that share a group.
    "shared groups": (
        "dense",
        "--tensor-model-parallel-size 8 --sequence-parallel",
        8,
        2 * (4 * 96 / 8 + 16 + 2 * 16 + 16 + 3 * 256 / 8),
    ),
    # Value in what is gathered of the projection: all heads and groups, in place of its 16.
    "shared groups, attention": (
        "dense",
        f"--tensor-model-parallel-size 8 --sequence-parallel {_SELECTIVE}",
        8,
        2 * (4 * 96 / 8 + 16 + 16 + (8 + 2 * 4) * 16 + 16 + 3 * 256 / 8),
    ),
    "split input": ("dense", f"{_TENSOR_2} --distribute-saved-activations {_ONE}", 2, 96),
}
# As the ones above, with layers of Transformer Engine, what is dropped of a layer.
DROPPED: dict[str, tuple[str, str, str, float]] = {
    "norms of a dense model": ("dense", "", "layernorm", 0),
    "norms of latent attention": ("latent", "", "layernorm", 2 * 96),
    "norms of experts": ("experts", "", "layernorm", 2 * 96),
    "MLP with its norm": ("dense", "", "mlp", 2 * (96 + 3 * 256)),
    "activation of experts": ("experts", "--moe-grouped-gemm", "moe_act", 2 * 2 * 64),
    "activation of a dense model": ("dense", "--moe-grouped-gemm", "moe_act", 0),
    # The output in bf16, and more in place of the value: queries, keys and values of 64 elements.
    "attention in FP8": (
        "dense",
        "--fp8-format e4m3 --fp8-recipe tensorwise",
        "core_attn",
        2 * 128 - 2 * (128 + 2 * 64 - 64),
    ),
}
# All of a model of eight layers: virtual stages with two layers each, and groups of three.
_STAGES = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"
UNMODELLED = (
    "--cpu-offloading-num-layers 1",
    "--fine-grained-activation-offloading --offload-modules attn_norm",
    "--fp4-format e2m1",
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    checked = Checked(tmp_path_factory.mktemp("recompute"))
    measure = "preflight_measured.measured_activations"
    for name, (model, added, layers, _) in MEASURED.items():
        argv = [*_MODELS[model], *added.split()]
        checked.measure(name, measure, argv, "--num-layers", layers)
        # Megatron has no local modules of latent attention for a GPU.
        _add(checked, name, _for_gpu(argv) if model == "latent" else argv, layers)
    for name, (added, numbers, _) in DEPTHS.items():
        is_hybrid = numbers == _PATTERNS
        flag = "--hybrid-layer-pattern" if is_hybrid else "--mtp-num-layers"
        argv = [*_SMALL, *added.split(), *([] if is_hybrid else ["--num-layers", "3"])]
        checked.measure(name, measure, argv, flag, numbers)
        # Nor of a HybridModel, or of a norm with sequence parallelism.
        _add(checked, name, _for_gpu(argv) if is_hybrid else argv, numbers, flag)
    for name, (model, added, size, _) in BY_HAND.items():
        argv = _for_gpu(_MODELS[model]) if "--sequence-parallel" in added else _MODELS[model]
        _add(checked, name, [*argv, *added.split()], (2, 3), size=size)
    for name, (model, added, module, _) in DROPPED.items():
        argv = [*_for_gpu(_MODELS[model]), *added.split()]
        _add(checked, f"{name}, kept", argv, (2, 3))
        argv += [*_SELECTIVE.split(), "--recompute-modules", module]
        _add(checked, f"{name}, dropped", argv, (2, 3))
    experts = [*_for_gpu(_MODELS["experts"]), *_TENSOR_2.split(), "--sequence-parallel"]
    _add(checked, "experts over 2", experts, (2, 3), size=2)
    experts += ["--expert-tensor-parallel-size", "1"]
    _add(checked, "experts over 1", experts, (2, 3), size=2)
    _add(checked, "virtual", [*_SMALL, *_STAGES.split(), *_BLOCK.split()], (8,), size=2)
    three = f"{_FULL} uniform --recompute-num-layers 3"
    _add(checked, "threes", [*_SMALL, *three.split()], (8,))
    ramp = _without(_without(_SMALL, "--global-batch-size 32"), "--train-iters 10")
    ramp += ["--pipeline-model-parallel-size", "4", "--train-samples", "100"]
    ramp += ["--step-batch-size-schedule", "0:2 2K:16"]
    _add(checked, "ramp", ramp, (4,), size=4)
    checked.add("one rank", [*_SMALL, "--num-layers", "2"], size=1)
    for flags in UNMODELLED:
        checked.add(flags, [*_for_gpu(_SMALL), "--num-layers", "2", *flags.split()], size=1)
    with pytest.MonkeyPatch.context() as patch:
        # Megatron asks for it with one of the arguments.
        patch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
        checked.run()
    return checked


def _add(
    checked: Checked,
    name: str,
    argv: list[str],
    numbers: tuple[object, ...],
    flag: str = "--num-layers",
    size: int = 1,
) -> None:
    for number in numbers:
        checked.add(f"{name} {number}", [*argv, flag, str(number)], size=size)


def _activations(checked: Checked, name: str) -> float:
    """Bytes a position on the first stage."""
    found = checked.found[name]
    assert found["fits"], found["findings"]
    return float(found["ranks"][0]["memory_bytes"]["training"]["activations"]) / _POSITIONS


def _of_a_layer(checked: Checked, name: str, numbers: tuple[object, object] = (2, 3)) -> float:
    fewer, more = (_activations(checked, f"{name} {number}") for number in numbers)
    return more - fewer


@pytest.mark.parametrize("name", MEASURED)
def test_a_layer_keeps_what_autograd_keeps(checked: Checked, name: str) -> None:
    *_, numbers, here = MEASURED[name]
    expected = _POSITIONS * (_of_a_layer(checked, name, numbers) + here)
    # Not in the formula: statistics of rows, angles of RoPE, indices of permutations.
    assert expected == pytest.approx(checked.measured[name]["bytes"], rel=0.04)


@pytest.mark.parametrize("name", DEPTHS)
def test_a_depth_keeps_what_autograd_keeps(checked: Checked, name: str) -> None:
    _, numbers, here = DEPTHS[name]
    expected = _POSITIONS * (_of_a_layer(checked, name, numbers) + here)
    assert expected == pytest.approx(checked.measured[name]["bytes"], rel=0.04)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_layer_keeps_what_was_counted_by_hand(checked: Checked, name: str) -> None:
    assert _of_a_layer(checked, name) == BY_HAND[name][-1]


@pytest.mark.parametrize("name", DROPPED)
def test_what_a_module_drops_depends_on_the_layer(checked: Checked, name: str) -> None:
    kept, left = (_of_a_layer(checked, f"{name}, {kind}") for kind in ("kept", "dropped"))
    assert kept - left == DROPPED[name][-1]


def test_ranks_that_share_an_expert_gather_its_tokens(checked: Checked) -> None:
    # Two visits of each of the rank's own half of the positions; of both halves where it is split.
    more = _of_a_layer(checked, "experts over 2") - _of_a_layer(checked, "experts over 1")
    assert more == 2 * 96 * 2 * (1 - 1 / 2)


def test_ranks_may_share_a_group_of_queries(checked: Checked) -> None:
    parameters = checked.found["shared groups 2"]["parameters"]
    assert parameters == checked.found["one rank"]["parameters"]
    flops = [checked.found[name]["flops_per_step"] for name in ("shared groups 2", "one rank")]
    assert flops[0] == flops[1]


def test_layers_beyond_those_that_are_recomputed_keep_everything(checked: Checked) -> None:
    layer, layer_input = BY_HAND["whole"][-1], 2 * 96
    # Five of the warm-up's micro-batches in one of two virtual stages, of two layers each.
    in_flight = 5 / 2 * 2 * (layer_input + layer)
    assert _activations(checked, "virtual 8") == in_flight + 2 * layer


def test_layers_that_are_recomputed_together_are_there_at_once(checked: Checked) -> None:
    layer, layer_input = BY_HAND["whole"][-1], 2 * 96
    # Groups of 3, 3 and 2; the gradients of one layer beside the largest.
    assert _activations(checked, "threes 8") == 3 * layer_input + 3 * layer + layer


def test_the_largest_batch_of_a_phase_fills_the_pipeline(checked: Checked) -> None:
    layer = BY_HAND["whole"][-1]
    # One micro-batch at first, and eight in the end.
    assert _activations(checked, "ramp 4") == 4 * layer + 2 * layer


@pytest.mark.parametrize("flags", UNMODELLED)
def test_what_is_not_modelled_is_said(checked: Checked, flags: str) -> None:
    warnings = checked.texts(flags, "warning")
    expected = f"{flags.split()[0]}: memory and FLOPs are estimated as without it."
    assert expected in warnings, checked.found[flags]["findings"]
