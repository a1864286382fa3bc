"""What an import of Hugging Face models refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tst.checkpoint.hf_import import import_from_huggingface


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_weights(
    change: Callable[[dict[str, torch.Tensor]], object],
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_shard(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def store_twice(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shutil.copyfile(shard, folder / "copy.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["copy"] = "copy.safetensors"
    index.write_text(json.dumps(content))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def transpose(weights: dict[str, torch.Tensor], name: str) -> None:
    name = f"model.layers.0.mlp.experts.{name}"
    weights[name] = weights[name].mT.contiguous()


ROW = torch.zeros(1, 32)
# Megatron makes the factor of sines and cosines of the logarithm of the other one.
YARN = {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e4, "attention_factor": 1.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
REFUSALS: list[tuple[str, Callable[[Path], None], str]] = [
    ("llama", remove_config, "has no config.json: pass a Hugging Face folder"),
    ("llama", pickles_only, r"pickles only \(pytorch_model.bin\).* convert them to safetensors"),
    ("llama", cut_off, r"model.safetensors cannot be read \(.*\): copy it again"),
    ("llama-old", store_twice, r"is in both .*copy.safetensors and .*00001-of"),
    ("llama-old", remove_shard, r"model-00001-of-\d+.safetensors is missing: copy the folder"),
    (
        "llama",
        change_config(architectures=["GPT2LMHeadModel"]),
        "architecture GPT2LMHeadModel: what can be imported is LlamaForCausalLM, Mistral",
    ),
    ("llama", change_config(architectures=None), r"architecture \(none in config.json\)"),
    ("llama", change_config(architectures=5), r"config.json has architectures 5: write a list"),
    ("llama", change_config(architectures=[None]), r"has architectures \[null\]: write a list"),
    ("llama", change_config(architectures=[{}]), r"has architectures \[\{\}\]: write a list"),
    ("llama", change_config(architectures="LlamaForCausalLM"), r'has architectures "LlamaForCaus'),
    ("llama", change_config(num_key_value_heads=3), "heads 4 and num_key_value_heads 3, and each"),
    ("qwen3-tied", change_config(num_attention_heads=0), "config.json has num_attention_heads 0"),
    ("qwen2-llama3", change_config(num_key_value_heads=0), "heads 4 and num_key_value_heads 0"),
    ("llama", change_config(attention_bias=True, mlp_bias=True), "attention_bias True, mlp_bias"),
    ("llama", change_config(hidden_act="gelu"), "hidden_act gelu: Megatron computes something"),
    ("llama", change_config(rope_parameters=YARN), "yarn, attention_factor 1.5, with factor 1.0"),
    ("llama", change_config(rope_parameters=DYNAMIC), "rope_parameters of rope_type dynamic"),
    (
        "llama-old",
        change_config(rope_scaling=LLAMA3),
        r"llama3 with original_max_position_embeddings 4096 \(8192\)",
    ),
    (
        "llama-old",
        change_config(rope_scaling={"type": "linear", "factor": 2.5}),
        r"rope_type linear with factor 2.5 \(no whole number\)",
    ),
    ("llama", change_config(quantization_config={"bits": 4}), "has quantization_config"),
    ("llama-old", change_config(rope_theta=0.5), r"rope_theta 0.5 \(not a whole number\)"),
    ("llama", change_config(hidden_size="wide"), r"refused by transformers \(.*hidden_size"),
    (
        "qwen3-tied",
        change_config(
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        "use_sliding_window True, layer_types sliding_attention",
    ),
    (
        "qwen3moe",
        change_config(num_experts_per_tok=1),
        "num_experts_per_tok 1 with norm_topk_prob True",
    ),
    ("qwen3moe", change_config(num_local_experts=0), "has no layer with experts"),
    ("qwen3moe", change_config(decoder_sparse_step=5), "has no layer with experts"),
    (
        "qwen2moe-bias",
        change_config(shared_expert_intermediate_size=0),
        "has shared experts of size 0",
    ),
    (
        "glm4moe-groups-qknorm",
        change_config(topk_group=1, norm_topk_prob=False),
        "norm_topk_prob False with sigmoid scores, n_group 4, topk_group 1 and num_experts_per_tok",
    ),
    ("glm4moe-groups-qknorm", change_config(n_shared_experts=0), "shared experts of size 0"),
    (
        "llama",
        change_config(architectures=["DeepseekV3ForCausalLM"]),
        "architecture DeepseekV3ForCausalLM .multi-head latent attention.*Glm4MoeForCausalLM",
    ),
    (
        "glm4moe-dense-bias",
        change_weights(lambda weights: weights.update({"model.layers.4.eh_proj.weight": ROW})),
        "has model.layers.4.eh_proj.weight, which Glm4MoeForCausalLM has no place for",
    ),
    (
        "qwen3moe-fused-raw",
        change_weights(lambda weights: transpose(weights, "gate_up_proj")),
        r"experts.gate_up_proj in .* has shape \[6, 32, 80\], and .* gives \[6, 80, 32\]",
    ),
    (
        "qwen3moe-fused-raw",
        change_weights(
            lambda weights: weights.update(
                {"model.layers.1.mlp.experts.0.down_proj.weight": torch.zeros(32, 40)}
            )
        ),
        r"experts.0.down_proj.weight in .* is also a part of .*experts.\*_proj, which holds all",
    ),
    (
        "llama",
        change_weights(lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight")),
        "has no model.layers.2.mlp.up_proj.weight: .* config.json describes, copy it again",
    ),
    (
        "llama",
        change_weights(lambda weights: weights.update({"score.weight": ROW})),
        "has score.weight, which LlamaForCausalLM has no place for",
    ),
    (
        "llama",
        change_weights(lambda weights: weights.update({"lm_head.weight": ROW})),
        r"lm_head.weight in .* has shape \[1, 32\], and config.json gives \[250, 32\]",
    ),
    (
        "qwen3-tied",
        change_weights(lambda weights: weights.update({"lm_head.weight": ROW})),
        "tie_word_embeddings true .* lm_head.weight is not model.embed_tokens.weight",
    ),
    (
        "llama",
        change_weights(
            lambda weights: weights.update({"model.norm.weight": torch.zeros(32).to(torch.int8)})
        ),
        "model.norm.weight in .* is of dtype I8: quantized",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSALS)
def test_bad_input_is_refused_before_anything_is_written(
    hf_models: dict[str, Path],
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None],
    message: str,
) -> None:
    folder = Path(shutil.copytree(hf_models[kind], tmp_path / "model"))
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        import_from_huggingface(folder, tmp_path / "new" / "checkpoint")
    assert str(folder) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_stacks_its_layers_has_them_of_one_dtype(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """GPTModel's checkpoints do; those of HybridModel hold each layer by itself."""
    folder = Path(shutil.copytree(hf_models["llama"], tmp_path / "model"))
    half = {"model.layers.1.input_layernorm.weight": torch.zeros(32).half()}
    change_weights(lambda weights: weights.update(half))(folder)
    message = "layers.1.input_layernorm.weight in torch.float16, .* torch.float32: pass --dtype"
    with pytest.raises(ValueError, match=message):
        import_from_huggingface(folder, tmp_path / "new", kind="gpt")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    import_from_huggingface(folder, tmp_path / "new", kind="hybrid")
