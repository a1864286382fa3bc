"""tools/preflight.py: what passes, and the words for what does not.

``tests/preflight_cases.py`` checks all launches of this file in one process.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.checkpoint.hf_import import import_from_huggingface
from megatron_tst.checkpoint.tracker import RELEASE
from megatron_tst.common.units import quantity
from megatron_tst.preflight.launch_command import read_launch
from megatron_tst.study.run_folder import RunFolder
from megatron_tst.study.study_file import read_study
from tests.corpus import write_corpus
from tests.hf_models import save_model
from tests.newer_torch import NEWER, OLDER, record_torch, write_as_newer_torch
from tests.preflight_broken import BROKEN, WHOLE
from tests.preflight_checked import MODELS, PRETRAIN, VARIANTS, Checked
from tests.preflight_gpu_only import GPU_ONLY, HEADS, LATENT, LATENT_LAYOUTS

ROOT = Path(__file__).parents[2]
GIB = 1 << 30

# Real models, small enough to be built and trained here: several buckets, and padding between them.
_SMALL = shlex.split(
    "--bf16 --transformer-impl local --num-layers 3 --hidden-size 96 --ffn-hidden-size 256 "
    "--num-attention-heads 8 --kv-channels 16 --group-query-attention --num-query-groups 4 "
    "--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 32 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--padded-vocab-size 256 --vocab-size 256 --train-iters 10 --lr 1e-3 "
    "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 100000 "
    "--no-rope-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm"
)
_EXPERTS = shlex.split(
    "--num-experts 8 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-token-dispatcher-type "
    "alltoall --moe-router-dtype fp32"
)
_DEPTHS = "--mtp-num-layers"
SMALL = {
    "dense": _SMALL,
    "experts": [*_SMALL, *_EXPERTS],
    "multi-token": [*_SMALL, _DEPTHS, "2"],
}
_LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm"
)
# By model, what the modules of the CPU keep of attention beside what those of a GPU do.
KEPT_HERE = {"dense": 2 * 2 * (128 - 64), "experts": 2 * 2 * (128 - 64), "latent": 0, "gated": 256}
LAYOUTS = {
    "dense": ["--tensor-model-parallel-size", "2"],
    "experts": ["--expert-model-parallel-size", "2"],
    "multi-token": ["--tensor-model-parallel-size", "2"],
}
OPTIMIZER_RANKS = (0, 7)
# Model, precision, GPUs and what is wrong in checkpoints without the mend; as documented.
MISPLACED = [
    ("270m", "bf16", 8, "57%"),
    ("270m", "bf16", 64, "48%"),
    ("270m", "bf16", 256, None),
    ("600m", "bf16", 8, "73%"),
    ("600m", "bf16", 64, None),
    ("600m", "mxfp8", 128, "23%"),
    ("3b", "bf16", 24, "90%"),
    ("3b", "fp8", 24, "86%"),
    ("3b", "bf16", 64, None),
    ("10b_a1b", "bf16", 24, "27%"),
]
UNREADABLE = "not for this torch"
# The torch that is said to have written a checkpoint.
TORCHES = {UNREADABLE: NEWER, "of a newer torch": NEWER, "of an older torch": OLDER}
GPU_STUDY = read_study(ROOT / "examples/studies/gpu.yaml")
SEVERAL_MISTAKES = [
    *("--yaml-cfg", "model.yaml"),
    *("--seq-length", "0"),
    *("--tst-max-epochs", "0"),
    *("--tst-step-ratio", "1.5"),
    *("--phase-transition-iterations", "6000"),
    *("--dataloader-type", "cyclic"),
]


def without(argv: list[str], flags: str) -> list[str]:
    """A command line without these arguments and their values."""
    kept, is_dropped = [], False
    for word in argv:
        if word.startswith("--"):
            is_dropped = word in flags.split()
        if not is_dropped:
            kept.append(word)
    return kept


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    checked = Checked(tmp_path_factory.mktemp("preflight"))
    corpus = checked.folder / "corpus"
    write_corpus(corpus, [50, 30])
    scripts = {}
    for model in MODELS:
        for variant in VARIANTS:
            scripts[model, variant] = checked.script(model, VARIANT=variant)
            checked.add(f"{model} {variant}", scripts[model, variant])
        hybrid = checked.script(model, VARIANT="tst", MODEL="hybrid")
        checked.add(f"{model} hybrid", hybrid)
    for name, (model, removed, added, _, _) in BROKEN.items():
        # The precision of the larger models, for mistakes with it.
        argv = without(checked.script(model, VARIANT="tst", PRECISION="mxfp8"), removed)
        if name not in WHOLE:
            argv += ["--num-layers", "3"]
        if name == "no text":
            argv += ["--data-path", str(corpus), "--tokenizer-model", str(checked.folder)]
        checked.add(name, [*argv, *added.split()])
    dense, experts = scripts["3b", "tst"], scripts["10b_a1b", "tst"]
    for name, (model, removed, added, _) in GPU_ONLY.items():
        argv = [*without(scripts[model, "tst"], removed), "--num-layers", "4"]
        checked.add(name, [*argv, *added.split()])
    for model in {model for model, *_ in GPU_ONLY.values()}:
        checked.add(f"{model} of 4", [*scripts[model, "tst"], "--num-layers", "4"])
    latent = [*without(dense, HEADS), "--num-layers", "4", *LATENT.split()]
    for name, layout in LATENT_LAYOUTS.items():
        checked.add(f"latent {name}", [*latent, *layout.split()])
    checked.measure("FLOPs latent one", "preflight_measured.megatron_flops", latent, 64)
    mamba = [*without(dense, "--num-layers"), "--hybrid-layer-pattern", "M-*-"]
    checked.add("mamba", mamba)
    pipeline = "--pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel"
    checked.add("pipeline", [*dense, *pipeline.split()])
    virtual = "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3"
    checked.add("virtual", [*dense, *virtual.split()])
    ahead = {
        "": [*dense, _DEPTHS, "2"],
        " in a pipeline": [*dense, _DEPTHS, "2", *pipeline.split()],
        " of one layer": [*dense, _DEPTHS, "2", "--mtp-use-repeated-layer"],
        " of experts": [*experts, _DEPTHS, "1"],
    }
    for name, argv in ahead.items():
        checked.add(f"multi-token{name}", argv)
        flops = "preflight_measured.megatron_flops"
        checked.measure(f"FLOPs multi-token{name}", flops, argv, 64)
    depths = "preflight_measured.measured_activations"
    checked.measure("activations of a depth", depths, _SMALL, _DEPTHS)
    for number in "23":
        checked.add(f"activations of {number} depths", [*_SMALL, _DEPTHS, number], size=1)
    split = f"{pipeline} --expert-model-parallel-size 4 --micro-batch-size 1"
    fewer = ["--num-layers", "8"]
    checked.add("experts whole", [*experts, *fewer])
    checked.add("experts split", [*experts, *fewer, *split.split()])
    checked.add("a rank", [*dense, *pipeline.split()], ranks=[63])
    checked.add("linear", [*dense, "--tst-loss-impl", "linear"])
    sharded = checked.script("3b", FSDP="1", PRECISION="bf16")
    checked.add("FSDP2", sharded)
    checked.add("FSDP2 over 24", [*sharded, "--global-batch-size", "384"], size=24)
    low = ["--use-precision-aware-optimizer"]
    low += ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
    checked.add("low mxfp8", [*dense, *low])
    checked.add("low bf16", [*checked.script("3b", PRECISION="bf16"), *low])
    here = ["--data-path", str(corpus), "--tokenizer-model", str(checked.folder)]
    checked.add("corpus", [*scripts["3b", "baseline"], *here])
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    checked.add("several mistakes", [*dense, *SEVERAL_MISTAKES])
    bags = "--num-layers 3 --tst-schedule 20:1000,6:5000 --save-interval 4000"
    argv = [*without(without(dense, "--tst-bag-size"), "--tst-step-ratio"), *bags.split()]
    checked.add("three phases", argv)
    argv = [*without(dense, "--tst-bag-size"), "--tst-bag-sizes", "2:3,20:1", "--num-layers", "3"]
    checked.add("drawn", argv)
    checked.add("recomputed", [*dense, *recompute.split()])
    for name, argv in SMALL.items():
        for rank in OPTIMIZER_RANKS:
            laid_out = [*argv, *LAYOUTS[name]]
            checked.add(f"{name} {rank}", laid_out, size=8, ranks=[rank])
            checked.measure(
                f"{name} {rank}", "preflight_measured.measured_optimizer", laid_out, 8, rank
            )
    attention = {
        "dense": _SMALL,
        "experts": SMALL["experts"],
        "latent": [*without(_SMALL, HEADS), *_LATENT],
        "gated": [*_SMALL, "--attention-output-gate"],
    }
    for name, argv in attention.items():
        checked.measure(f"activations {name}", "preflight_measured.measured_activations", argv)
        # Megatron has no local modules of latent attention for a GPU.
        argv = without(argv, "--transformer-impl") if name == "latent" else argv
        checked.add(f"activations {name} 2", [*argv, "--num-layers", "2"], size=1)
        checked.add(f"activations {name} 3", [*argv, "--num-layers", "3"], size=1)
    for name, argv in _loads(checked.folder).items():
        checked.add(name, [*scripts["270m", "tst"], "--num-layers", "3", *argv])
    for model, precision, size, _ in MISPLACED:
        argv = checked.script(model, PRECISION=precision, MICRO_BATCH_SIZE="1")
        batch = ["--global-batch-size", str(16 * size)] if size % 3 == 0 else []
        checked.add(f"{model} {precision} {size}", [*argv, *batch], size=size)
    for model in MODELS:
        checked.measure(
            f"FLOPs {model}", "preflight_measured.megatron_flops", scripts[model, "tst"], 64
        )
    for run in GPU_STUDY.runs():
        outputs = RunFolder(Path("/absent")).outputs(keeps_checkpoints=True)
        checked.add(
            f"gpu study {run.name}",
            [*run.arguments, *outputs],
            size=GPU_STUDY.processes,
            gpu_bytes=80e9,
            tokenizer_ids=16384,
        )
    checked.run()
    return checked


@pytest.mark.parametrize("name", [run.name for run in GPU_STUDY.runs()])
def test_every_arm_of_the_gpu_study_starts_and_fits(checked: Checked, name: str) -> None:
    found = checked.found[f"gpu study {name}"]
    assert [checked.texts(f"gpu study {name}", level) for level in ("error", "warning")] == [[], []]
    assert found["fits"]
    assert found["parameters"]["total"] == 42_476_032


def _loads(folder: Path) -> dict[str, list[str]]:
    """Arguments that load the weights of other versions of torch."""
    source = save_model(folder / "weights", "llama")
    for name, version in TORCHES.items():
        import_from_huggingface(source, folder / name)
        record_torch(folder / name / RELEASE, version)
    write_as_newer_torch(folder / UNREADABLE / RELEASE)
    absent = ["--load", str(folder / "absent"), "--pretrained-checkpoint", str(folder / UNREADABLE)]
    return {name: ["--load", str(folder / name)] for name in TORCHES} | {"by default": absent}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_launches_pass_without_a_warning(checked: Checked, model: str, variant: str) -> None:
    name = f"{model} {variant}"
    assert checked.found[name]["fits"]
    assert not checked.texts(name, "error") + checked.texts(name, "warning")
    # Not the import of Megatron; some ten times what was measured.
    assert checked.found[name]["seconds"] < 30


def test_the_shards_of_fsdp2_are_counted(checked: Checked) -> None:
    found = checked.found["FSDP2"]
    assert found["fits"], found["findings"]
    assert not checked.texts("FSDP2", "warning")
    memory = found["ranks"][0]["memory_bytes"]["phase 1"]
    # Main weights and moments in fp32, and a gradient in fp32 while it is taken in.
    shard = found["parameters"]["total"] / 64
    assert memory["optimizer"] == pytest.approx(16 * shard, rel=1e-6)
    # Two layers and the output layer are whole, of 36 layers.
    output = 128256 * 2048
    layer = (found["parameters"]["total"] - 2 * output - 2048) / 36
    assert memory["weights"] == pytest.approx(2 * (shard + output + 2048 + 2 * layer), rel=1e-6)
    assert memory["gradients"] == pytest.approx(2 * (shard + output + 2048 + layer), rel=1e-6)
    unequal = checked.texts("FSDP2 over 24", "error")
    assert any("over 24 ranks" in text and "cannot be saved" in text for text in unequal), unequal


def test_a_weak_balance_of_experts_is_noted(checked: Checked) -> None:
    notes = "\n".join(checked.texts("10b_a1b tst", "note"))
    assert "global_aux_loss: Megatron divides its gradient by the 64 data-parallel ranks" in notes
    assert "global_aux_loss" not in "\n".join(checked.texts("3b tst", "note"))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_launches_are_told_in_the_right_words(checked: Checked, case: str) -> None:
    *_, level, words = BROKEN[case]
    texts = checked.texts(case, level)
    assert any(words in text for text in texts), checked.found[case]["findings"]
    assert checked.found[case]["fits"] == (level == "warning")


@pytest.mark.parametrize("case", GPU_ONLY)
def test_what_only_a_gpu_computes_is_counted_or_said_to_be_unknown(
    checked: Checked, case: str
) -> None:
    model, *_, more = GPU_ONLY[case]
    found = checked.found[case]
    assert found["fits"], found["findings"]
    warnings = "\n".join(checked.texts(case, "warning"))
    if more is None:
        assert "parameters" not in found
        assert "the model is not built here" in warnings
        return
    assert "not built" not in warnings
    without_it = checked.found[f"{model} of 4"]["parameters"]["total"]
    assert found["parameters"]["total"] == without_it + more


@pytest.mark.parametrize("layout", LATENT_LAYOUTS)
def test_latent_attention_is_counted(checked: Checked, layout: str) -> None:
    found = checked.found[f"latent {layout}"]
    assert found["fits"], found["findings"]
    hidden, heads, width = 2048, 16, 128 + 64
    queries = hidden * 256 + 256 * heads * width
    keys_and_values = hidden * (128 + 64) + 128 * heads * (128 + 128)
    attention = queries + keys_and_values + heads * 128 * hidden
    # Of groups of queries, which this takes the place of.
    replaced = hidden * 128 * (2 * heads + 2 * 4)
    usual = checked.found["3b of 4"]["parameters"]["total"]
    assert found["parameters"]["total"] == usual + 4 * (attention - replaced)


def test_layers_that_are_not_built_are_not_counted_as_nothing(checked: Checked) -> None:
    assert "parameters" not in checked.found["mamba"]
    (text,) = [t for t in checked.texts("mamba", "warning") if "not built" in t]
    assert text.startswith("--hybrid-layer-pattern M-*- (M): ")


def test_the_torch_that_runs_is_named(checked: Checked) -> None:
    assert f"torch {torch.__version__} runs here, " in checked.texts("270m tst", "note")[0]
    assert checked.found["270m tst"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("case", "level", "words"),
    [
        (UNREADABLE, "error", f"whole and was written by torch {NEWER}"),
        ("by default", "error", f"whole and was written by torch {NEWER}"),
        ("of a newer torch", "warning", f"release was written by torch {NEWER}"),
        ("of an older torch", "note", f"release was written by torch {OLDER}"),
    ],
)
def test_checkpoints_of_other_torches_are_told(
    checked: Checked, case: str, level: str, words: str
) -> None:
    (text,) = [text for text in checked.texts(case, level) if "written by" in text]
    assert words in text
    assert torch.__version__ in text
    if level != "note":
        assert f"use torch {NEWER}" in text
    assert checked.found[case]["fits"] == (level != "error")


def test_all_errors_of_arguments_are_told_at_once(checked: Checked) -> None:
    """A run ends with the first of them."""
    errors = "\n".join(checked.texts("several mistakes", "error"))
    assert "--yaml-cfg model.yaml is not supported" in errors
    for flag in SEVERAL_MISTAKES[2::2]:
        assert f"{flag} " in errors
    assert len(errors.splitlines()) == len(SEVERAL_MISTAKES) / 2


def test_documented_output_is_that_of_the_tool(checked: Checked) -> None:
    documented = (ROOT / "docs/preflight.md").read_text().splitlines()
    for model in MODELS:
        for variant in VARIANTS:
            lines = checked.found[f"{model} {variant}"]["lines"]
            missing = [line for line in lines if line not in documented and "note: " not in line]
            assert not missing


@pytest.mark.parametrize("model", MODELS)
def test_both_kinds_of_models_are_estimated_alike(checked: Checked, model: str) -> None:
    hybrid, gpt = (checked.found[f"{model} {kind}"] for kind in ("hybrid", "tst"))
    assert hybrid["lines"] == gpt["lines"]
    assert hybrid["findings"] == gpt["findings"]


@pytest.mark.parametrize(("model", "precision", "size", "share"), MISPLACED)
def test_what_megatron_alone_saves_wrongly_is_noted(
    checked: Checked, model: str, precision: str, size: int, share: str | None
) -> None:
    name = f"{model} {precision} {size}"
    assert not checked.texts(name, "error")
    notes = [text for text in checked.texts(name, "note") if "without the mend" in text]
    assert len(notes) == (share is not None)
    assert all(f" {share} of the master weights" in text for text in notes)


def test_published_sizes(checked: Checked) -> None:
    # As transformers counts the same shapes; 10B-A1B: as published.
    expected = {
        "270m": (267_225_408, 119_474_496),
        "600m": (600_208_320, 353_956_800),
        "3b": (3_337_766_912, 2_812_430_336),
        "10b_a1b": (10_489_144_832, 962_700_800),
    }
    for model, (total, active) in expected.items():
        parameters = checked.found[f"{model} tst"]["parameters"]
        assert (parameters["total"], parameters["active_without_embeddings"]) == (total, active)


@pytest.mark.parametrize(
    ("layout", "one_stage"),
    [
        ("pipeline", "3b tst"),
        ("virtual", "3b tst"),
        ("experts split", "experts whole"),
        ("multi-token in a pipeline", "multi-token"),
    ],
)
def test_every_layout_has_the_same_model(checked: Checked, layout: str, one_stage: str) -> None:
    found, whole = checked.found[layout], checked.found[one_stage]
    assert [rank["pipeline_rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    for key in ("parameters", "flops_per_step", "data_tokens", "checkpoint_bytes"):
        assert found[key] == whole[key]


def test_ranks_are_those_asked_for(checked: Checked) -> None:
    assert [r["rank"] for r in checked.found["a rank"]["ranks"]] == [63]
    # The last stage, whose ranks have the final norm.
    first = checked.found["pipeline"]["ranks"][3]
    assert (
        checked.found["a rank"]["ranks"][0]["parameters"]["weights"]
        == (first["parameters"]["weights"])
    )


@pytest.mark.parametrize("rank", OPTIMIZER_RANKS)
@pytest.mark.parametrize("name", SMALL)
def test_weights_gradients_and_optimizer_are_those_of_real_ones(
    checked: Checked, name: str, rank: int
) -> None:
    measured = checked.measured[f"{name} {rank}"]
    (found,) = checked.found[f"{name} {rank}"]["ranks"]
    counted = {key: found["parameters"][key] for key in ("weights", "buffer", "shard")}
    assert counted == {key: measured[key] for key in counted}
    memory = found["memory_bytes"]["training"]
    assert memory["gradients"] == measured["gradient_bytes"]
    assert memory["optimizer"] == 12 * measured["shard"]
    assert memory["weights"] == 2 * measured["weights"]


@pytest.mark.parametrize(
    ("name", "mlp_width"),
    [("dense", 256), ("experts", 2 * 2 * 64), ("latent", 256), ("gated", 256)],
)
def test_activations_of_a_layer_are_those_that_autograd_keeps(
    checked: Checked, name: str, mlp_width: int
) -> None:
    two, three = (
        checked.found[f"activations {name} {layers}"]["ranks"][0]["memory_bytes"]["training"]
        for layers in (2, 3)
    )
    layer = three["activations"] - two["activations"]
    # What the modules of the CPU keep and fused ones of a GPU do not: attention each key and value
    # for all heads, SwiGLU its sigmoid and, with weights, its unweighted result.
    expected = layer + 2 * 128 * (KEPT_HERE[name] + 2 * mlp_width)
    # Not in the formula: statistics of rows, angles of RoPE, indices of permutations.
    assert expected == pytest.approx(checked.measured[f"activations {name}"]["bytes"], rel=0.04)


def test_activations_of_a_depth_are_those_that_autograd_keeps(checked: Checked) -> None:
    two, three = (
        checked.found[f"activations of {number} depths"]["ranks"][0]["memory_bytes"]["training"]
        for number in "23"
    )
    # As above, and Megatron's loss on a CPU keeps its logits in fp32.
    heads, swiglu, logits = 2 * 2 * (128 - 64), 2 * 256, 4 * 256
    expected = three["activations"] - two["activations"] + 2 * 128 * (heads + swiglu + logits)
    assert expected == pytest.approx(checked.measured["activations of a depth"]["bytes"], rel=0.04)
    assert three["logits"] == pytest.approx(two["logits"] * 4 / 3)


def test_multi_token_prediction_is_counted(checked: Checked) -> None:
    usual = checked.found["3b tst"]["parameters"]
    layer, rest = divmod(usual["total"] - checked.found["3b of 4"]["parameters"]["total"], 36 - 4)
    assert rest == 0
    depth = layer + 2 * 2048 * 2048 + 3 * 2048
    for name, number in (("", 2), (" of one layer", 1)):
        parameters = checked.found[f"multi-token{name}"]["parameters"]
        assert parameters["total"] == usual["total"] + number * depth
        assert parameters["active_without_embeddings"] == usual["active_without_embeddings"]


@pytest.mark.parametrize(
    "launch",
    [
        *(f"multi-token{kind}" for kind in ("", " in a pipeline", " of one layer", " of experts")),
        "latent one",
    ],
)
def test_flops_of_other_layers_are_near_those_that_megatron_logs(
    checked: Checked, launch: str
) -> None:
    found = checked.found[launch]["flops_per_step"]
    assert found == pytest.approx(checked.measured[f"FLOPs {launch}"], rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_flops_are_near_those_that_megatron_logs(checked: Checked, model: str) -> None:
    # Megatron leaves out norms' weights and the router, and rounds nothing.
    found = checked.found[f"{model} tst"]["flops_per_step"]
    assert found == pytest.approx(checked.measured[f"FLOPs {model}"], rel=0.01)


def test_windows_are_counted(checked: Checked) -> None:
    usual, found = (checked.found[name]["flops_per_step"] for name in ("3b of 4", "window"))
    # Three of four layers; a position sees half of the sequence, or what is left of the window.
    positions, width, length, window = 512 * 4096, 16 * 128, 4096, 1025
    saved = length / 2 - (window - window**2 / (2 * length))
    assert usual - found == pytest.approx(3 * 12 * positions * width * saved)


def test_text_is_counted_where_the_corpus_is(checked: Checked) -> None:
    (corpus,) = checked.found["corpus"]["corpora"]
    # Two documents, of which the share of the train split rounds to both.
    assert corpus["available"] == 80
    needed = 20_000 * 512 * 4096
    assert corpus["phase_2"] == needed
    assert corpus["epochs"] == needed / 80


def test_less_is_kept_where_it_is_asked_for(checked: Checked) -> None:
    def memory(name: str) -> dict[str, float]:
        found: dict[str, float] = checked.found[name]["ranks"][0]["memory_bytes"]["phase 2"]
        return found

    whole = memory("3b tst")
    # A layer keeps its input: 36 layers, 8192 positions, 2048 bf16 values.
    assert memory("recomputed")["activations"] < whole["activations"] / 5
    assert memory("recomputed")["activations"] > 36 * 8192 * 2048 * 2
    # A block of logits, and the weight's gradient in fp32: half of what is left.
    assert memory("linear")["logits"] < whole["logits"] * 0.7
    assert memory("linear")["logits"] > 128256 * 2048 * 4


@pytest.mark.parametrize(("precision", "main_weight"), [("bf16", 2), ("mxfp8", 4)])
def test_moments_in_bf16(checked: Checked, precision: str, main_weight: int) -> None:
    # Only bf16 weights are the upper half of a main weight.
    assert checked.found[f"low {precision}"]["fits"]
    (rank,) = checked.found[f"low {precision}"]["ranks"]
    optimizer = rank["memory_bytes"]["phase 1"]["optimizer"]
    assert optimizer == (main_weight + 4) * rank["parameters"]["shard"]


def test_phase_2_of_megatrons_loss_needs_most(checked: Checked) -> None:
    def logits(name: str, phase: str) -> float:
        return float(checked.found[name]["ranks"][0]["memory_bytes"][phase]["logits"])

    one = 8192 * 128256
    assert [logits("3b tst", f"phase {i}") for i in (1, 2)] == [2 * one, 2 * one]
    assert [logits("host loss", f"phase {i}") for i in (1, 2)] == [2 * one, 6 * one]
    assert logits("3b baseline", "training") == 2 * one
    lines = [checked.found[name]["lines"] for name in ("3b tst", "host loss", "3b baseline")]
    assert "loss         bags: triton, plain: triton" in lines[0]
    assert "loss         bags: triton, plain: host" in lines[1]
    assert "loss         plain: triton" in lines[2]
    phases = checked.found["3b tst"]["ranks"][0]["memory_bytes"]
    assert phases["phase 1"]["inputs"] > phases["phase 2"]["inputs"]


def test_each_of_three_phases_is_counted(checked: Checked) -> None:
    found = checked.found["three phases"]
    assert [phase["bag_size"] for phase in found["phases"]] == [20, 6, 1]
    memory = found["ranks"][0]["memory_bytes"]
    inputs = [memory[f"phase {i}"]["inputs"] for i in (1, 2, 3)]
    positions = 8192
    # Tokens and labels; without bags there is no fp32 sum.
    assert inputs[0] - inputs[1] == positions * 2 * 8 * 14
    assert inputs[1] - inputs[2] == positions * (2 * 8 * 5 + 4 * 2048)
    assert memory["phase 2"]["logits"] == memory["phase 1"]["logits"] == memory["phase 3"]["logits"]
    lines = found["lines"]
    starts = [line for line in lines if line.startswith("phase ")]
    assert starts[0].startswith("phase 1      steps 0 to 999, s = 20: ")
    assert starts[1].startswith("phase 2      steps 1,000 to 5,999, s = 6: ")
    assert starts[2].startswith("phase 3      steps 6,000 to 19,999: ")
    # Five by the interval, and one at each switch.
    assert any(" 7 of them" in line for line in lines)
    flag = "--tst-schedule 20:1000,6:5000 has bags of 20: the largest published ones are of 16."
    assert any(flag in line for line in lines)
    assert any("the switch at step 1000 comes before the end of the warm-up" in x for x in lines)


def test_drawn_sizes_are_counted(checked: Checked) -> None:
    found = checked.found["drawn"]
    config = SuperpositionConfig(bag_sizes="2:3,20:1", steps=6000)
    schedule = SuperpositionSchedule(config, 20_000, BatchSizes.constant(512), 4096)
    text = quantity(schedule.data_tokens(6000))
    assert f"phase 1      steps 0 to 5,999, s = 2:3 or 20:1: {text} tokens" in found["lines"]
    # The largest bags need the most memory.
    inputs, largest = (
        checked.found[name]["ranks"][0]["memory_bytes"]["phase 1"]["inputs"]
        for name in ("drawn", "three phases")
    )
    assert inputs == largest


@pytest.mark.parametrize(
    "launch",
    [
        "torchrun --nproc-per-node 8 pretrain_gpt.py",
        "torchrun --nproc-per-node 8 --no-python tst pretrain",
        "tst pretrain",
    ],
)
def test_a_script_that_knows_no_dry_run_is_not_launched(tmp_path: Path, launch: str) -> None:
    script = tmp_path / "pretrain_llama.sh"
    script.write_text(
        "#!/bin/bash\nSTEPS=$(python3 -c 'print(5 * 2)')\n"
        'ARGS=(--train-iters "$STEPS" --data-path "a b")\n'
        f'{launch} "${{ARGS[@]}}" "$@"\n'
    )
    found = read_launch(script, ["--seed", "3"]).arguments
    assert found == ["--train-iters", "10", "--data-path", "a b", "--seed", "3"]


def test_a_command_in_quotes_is_found(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "OPTIONS='--bf16 --lr 1e-3'\nsrun -l sh -c \"python -u pretrain_gpt.py $OPTIONS\"\n"
    )
    assert read_launch(script).arguments == ["--bf16", "--lr", "1e-3"]


def test_a_file_of_arguments_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "arguments.txt"
    file.write_text("--bf16 # precision\n--data-path 'a b'\n")
    found = read_launch(file, ["--seed", "3"]).arguments
    assert found == ["--bf16", "--data-path", "a b", "--seed", "3"]
    file.write_text("torchrun --nnodes 8 -m megatron_tst.pretrain --bf16")
    assert read_launch(file).arguments == ["--bf16"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.sh", None, "cannot be read"),
        ("usage.sh", "echo 'error: DATA_PATH is not set' >&2; exit 2", "error: DATA_PATH is not"),
        ("other.sh", "echo hello", "launches no program named pretrain"),
        ("quotes", "--data-path 'a", "not quoted as in a shell"),
    ],
)
def test_unusable_scripts_are_told(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_launch(tmp_path / name)


def preflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/preflight.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_tool_writes_its_report_and_ends_with_1_on_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATA_PATH", "TOKENIZER", "OUTPUT_DIR"):
        monkeypatch.setenv(name, "/absent")
    script, report = str(PRETRAIN / "pretrain_gpt_270m.sh"), tmp_path / "report.json"
    small = ["--gpu-memory", "24", "--json", str(report)]
    done = preflight(script, "--world-size", "64", *small, "--", "--seed", "7")
    assert done.returncode == 1, done.stderr
    assert "error: rank 0 needs about 33 GiB in phase 1, and a GPU has 22 GiB" in done.stdout
    assert "phase 1      steps 0 to 5,999, s = 6: 75.5 B tokens" in done.stdout
    found = json.loads(report.read_text())
    assert not found["fits"]
    assert found["switch_step"] == 6000
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_tool_tells_a_recipe_that_the_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_PATH", "TOKENIZER", "OUTPUT_DIR"):
        monkeypatch.setenv(name, "/absent")
    monkeypatch.setenv("PRECISION", "mxfp8")
    launch = str(PRETRAIN / "pretrain_gpt_270m.sh"), "--world-size", "64"
    done = preflight(*launch, "--compute-capability", "9.0")
    assert done.returncode == 1, done.stderr
    words = "error: --fp8-recipe mxfp8 needs compute capability 10.0, and the GPU has 9.0"
    assert words in done.stdout


def test_tool_ends_with_2_on_unusable_input(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = preflight(str(tmp_path / "absent.sh"), "--world-size", "64", "--json", str(report))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/absent.sh cannot be read")
    assert not report.exists()
