"""Tiny random models in folders that the export wrote: what the engines get.

Each goes from transformers into a Megatron checkpoint with padded rows, and out of it again with a
tokenizer that preprocessing made.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROOT = Path(__file__).parents[2]
MODELS = ("llama-bytes", "llama-bpe", "qwen3-bpe", "qwen3moe-bpe")
"""Architecture and tokenizer."""
TEXT = "In 2024, the  café had 1234567 guests.\n\tNobody can tell"
NEW_TOKENS = 12
_BPE_SIZE = 384
_SETTINGS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    # Not what engines take where they do not find it.
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
_HEAD = {"llama": 16, "qwen3": 32, "qwen3moe": 32}
"""Size of a head; those of Qwen3 are not hidden_size / num_attention_heads."""
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
_CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def save_exports(folder: Path) -> None:
    """Writes an export of each of ``MODELS``, and what transformers makes of it."""
    for name in MODELS:
        architecture, kind = name.split("-")
        tokenizer = _tokenizer(folder, kind)
        source, megatron = folder / f"{name}-source", folder / f"{name}-megatron"
        _save_source(source, architecture, len(AutoTokenizer.from_pretrained(tokenizer)))
        padding = ("--pad-vocab-to-multiple-of", "64")
        _tool("convert_hf_to_megatron", "--model", source, "--output", megatron, *padding)
        exported = ("--tokenizer", tokenizer, "--output", folder / name)
        _tool("convert_megatron_to_hf", "--checkpoint", megatron, *exported)
        torch.save(_expected(folder / name), folder / f"{name}-expected.pt")


def _tool(name: str, *arguments: str | Path) -> None:
    command = [sys.executable, ROOT / f"tools/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def _tokenizer(folder: Path, kind: str) -> Path:
    tokenizer = folder / f"{kind}-tokenizer"
    if not tokenizer.is_dir():
        how = ["--byte-level"] if kind == "bytes" else ["--train-bpe", str(_BPE_SIZE)]
        prefix = ("--output-prefix", folder / kind)
        _tool("preprocess_data", "--input", ROOT / "docs/glossary.md", *how, *prefix)
    return tokenizer


def _save_source(folder: Path, architecture: str, vocabulary: int) -> None:
    torch.manual_seed(len(architecture))
    config_class, model_class = _CLASSES[architecture]
    experts = _EXPERTS if architecture.endswith("moe") else {}
    settings = {**_SETTINGS, **experts, "head_dim": _HEAD[architecture]}
    model = model_class(config_class(vocab_size=vocabulary, **settings))
    for name, parameter in model.named_parameters():
        # Norms start at one, where exchanging them would not show.
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def _expected(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        logits = model(tokens).logits[0]
    return {"ids": ids, "tokens": tokens[0, len(ids) :].tolist(), "logits": logits.numpy().tolist()}
